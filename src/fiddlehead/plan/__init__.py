"""Plans a run before it starts: sizes, kernels, memory, time, and all problems."""
