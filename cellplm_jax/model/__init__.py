"""The model as pure functional Flax Linen modules."""
