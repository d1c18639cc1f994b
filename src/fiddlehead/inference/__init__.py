"""Using a trained model: generation, text, chat, and lm-evaluation-harness."""
