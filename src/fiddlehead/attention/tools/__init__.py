"""Tests and measurements of the kernels: the doctor, the trial before training, times, memory."""
