"""Training in several processes: the strategy, the pipeline, gradients, and the sizes of the mesh."""
