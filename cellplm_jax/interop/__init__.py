"""Exchange with the published PyTorch checkpoints."""
