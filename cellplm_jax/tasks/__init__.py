"""AnnData in, AnnData out: what a user does with a trained model."""
