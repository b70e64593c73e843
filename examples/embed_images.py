"""Embed a folder of images and find the ones most like the first; `navit embed` does millions."""

import sys
from pathlib import Path

import torch

from navit import EmbedConfig, Embedder


def most_alike(checkpoint: str, folder: str, count: int = 5) -> list[tuple[str, float]]:
    """Return the images most like the first one of a folder, and their cosine to it."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".jpg", ".png"))
    embedder = Embedder(checkpoint, EmbedConfig(normalize=True))
    found = embedder.embed(paths, on_error="nan")  # a row of NaN where a file cannot be read
    readable = found.vectors.isfinite().all(1)
    cosine = torch.where(readable, found.vectors @ found.vectors[readable][0], -torch.inf)
    best = cosine.topk(min(count, int(readable.sum())))
    return [(str(paths[i]), cosine[i].item()) for i in best.indices.tolist()]


if __name__ == "__main__":
    for path, cosine in most_alike(*sys.argv[1:3]):
        print(f"{cosine:.3f}  {path}")
