"""Retrieval, caption prompts and a shape-only baseline over the vectors of a trained model."""
