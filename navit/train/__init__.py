"""Training: the only place where data meets model."""
