"""Callbacks: checkpoints, metrics, the time of phases, profiles, sample answers, stopping."""
