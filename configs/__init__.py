"""Configurations for the programs in ``launch/``, as ml_collections expects them."""
