"""Likelihoods and training objectives as pure functions in float32."""
