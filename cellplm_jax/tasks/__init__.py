"""Tasks of a trained model on AnnData: embedding, clustering and estimators."""
