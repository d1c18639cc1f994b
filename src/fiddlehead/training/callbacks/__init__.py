"""What is done beside the training steps: checkpoints, metrics, phases, the profile, sample answers, stopping."""
