"""Metrics on arrays: no AnnData, no model, no files."""
