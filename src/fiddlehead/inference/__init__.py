"""Using a trained model: generation, text and chat, and lm-evaluation-harness."""
