"""Training: state, optimizer, step, checkpoints, loop."""
