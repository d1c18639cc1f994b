"""Weights on disk: the folder of a checkpoint, how its tensors are cut, and other formats in and out."""
