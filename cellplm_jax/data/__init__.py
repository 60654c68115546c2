"""Cells at the edge of the model: AnnData files, gene identifiers, bundled datasets, padded batches."""
