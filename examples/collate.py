"""Packing in a `DataLoader` one already has: the new part is `collate_fn`."""

import torch
from PIL import Image
from torch.utils.data import DataLoader

from navit import NaViT, NaViTConfig
from packer import PackerConfig, PackingCollator


def encode(dataset: object) -> tuple[list[str], torch.Tensor]:
    """Return captions and vectors (N, D) of a map-style dataset of (image, caption) pairs."""
    cuda = torch.cuda.is_available()
    collate = PackingCollator(PackerConfig(patch_size=16, seq_len=512))
    loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=collate, pin_memory=cuda)
    model = NaViT(NaViTConfig.named("tiny", patch_size=16)).to("cuda" if cuda else "cpu").eval()
    captions, vectors = [], []
    with torch.inference_mode():
        for batch in loader:
            captions += batch.texts
            vectors.append(model(batch.to("cuda" if cuda else "cpu")).pooled.cpu())
    return captions, torch.cat(vectors)


if __name__ == "__main__":
    sizes = [(64 + 8 * i, 256 - 4 * i) for i in range(24)]  # a list is a map-style dataset
    captions, vectors = encode([(Image.new("RGB", size), f"{size} pixels") for size in sizes])
    print(f"{len(captions)} captions, vectors {tuple(vectors.shape)}")
