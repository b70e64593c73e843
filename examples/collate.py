"""Packing in a `DataLoader` one already has: the new part is `collate_fn`."""

import random

import torch
from torch.utils.data import DataLoader, Dataset

from navit import NaViT, NaViTConfig
from packer import PackerConfig, PackingCollator
from packer.demo import draw_caption, draw_image, draw_scene
from packer.plan.types import ImageSize


class Scenes(Dataset):
    """Stands for the dataset one has: item i is a pair (PIL image, caption), sizes mixed."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> object:
        scene = draw_scene(random.Random(index))
        image = draw_image(scene, ImageSize(height=64 + 8 * index, width=256 - 4 * index))
        return image, draw_caption(scene, random.Random(index))


def main(dataset: Dataset | None = None) -> tuple[list[str], torch.Tensor]:
    """Encode a dataset and return the captions of its N images and their vectors (N, D)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(
        dataset or Scenes(),
        batch_size=8,
        num_workers=2,
        collate_fn=PackingCollator(PackerConfig(patch_size=16, seq_len=512)),
        pin_memory=device.type == "cuda",
    )
    model = NaViT(NaViTConfig.named("tiny", patch_size=16)).to(device).eval()
    captions, vectors = [], []
    for batch in loader:
        with torch.inference_mode():
            pooled = model(batch.to(device, non_blocking=True)).pooled
        print(f"{batch.num_images} images in {len(batch.patches)} sequences -> {pooled.shape}")
        captions += batch.texts or ()
        vectors.append(pooled.cpu())
    return captions, torch.cat(vectors)


if __name__ == "__main__":
    main()
