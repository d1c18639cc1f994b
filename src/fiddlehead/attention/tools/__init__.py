"""Trying, timing and measuring the kernels: the doctor, a trial before training, times, memory."""
