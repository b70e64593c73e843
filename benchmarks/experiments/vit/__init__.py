"""ViT's own tools at a small scale: masked patch prediction, fine-tuning at a higher resolution."""
