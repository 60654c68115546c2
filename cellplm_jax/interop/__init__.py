"""Conversion of published PyTorch checkpoints, and models on the Hugging Face Hub."""
