"""What is known of a run before it starts: sizes, kernels, memory, time, and everything that is wrong with it."""
