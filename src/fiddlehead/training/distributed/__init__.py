"""Training in several processes: the strategy, the pipeline, gradients, and how many processes share what."""
