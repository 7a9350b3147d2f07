"""Training: recipe, mixture, batches, trainer, checkpoint."""
