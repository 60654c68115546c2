"""AnnData input, gene names, bundled datasets, corpora and training batches."""
