"""The kernels that can serve a call of `attend`, one file each: what it cannot do and why, and how it is run."""
