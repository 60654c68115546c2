"""Parity with the original PyTorch implementation."""
