"""NeMo 2.0's checkpoints: their files, their settings, and the map of Megatron-core's tensors to ours."""
