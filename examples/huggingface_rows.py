"""Packing the rows of a Hugging Face data set, whose images stay encoded until they have a place.

With the `datasets` package installed, any image-text data set gives such rows; where its columns
are not called "image" and "text" (or "caption", "label"), `rename_column` makes them so:

    import datasets

    rows = datasets.load_dataset("imagefolder", data_dir="pictures", split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))

``decode=False`` matters: the packer reads each image's size from its header and decodes a JPEG only
as far as its tokens need. Decoded rows (PIL images) work too, and cost the full decode.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader

from packer import PackedBatch, PackerConfig, PackingCollator


def batches(rows: Sequence[dict[str, Any]]) -> list[PackedBatch]:
    """Return the packed batches of the rows, in their order."""
    collate = PackingCollator(PackerConfig(patch_size=16, seq_len=512, max_tokens=256))
    return list(DataLoader(rows, batch_size=8, num_workers=2, collate_fn=collate))


def undecoded_rows(count: int) -> list[dict[str, Any]]:
    """Make rows as ``cast_column("image", Image(decode=False))`` leaves them."""
    rows = []
    for i in range(count):
        buffer = BytesIO()
        Image.new("RGB", (64 + 8 * i, 256 - 4 * i), (10 * i, 0, 0)).save(buffer, "JPEG")
        image = {"bytes": buffer.getvalue(), "path": f"{i:05d}.jpg"}
        rows.append({"image": image, "text": f"picture {i}"})
    return rows


if __name__ == "__main__":
    for batch in batches(undecoded_rows(24)):
        print(f"{batch.texts[0]} to {batch.texts[-1]}: {len(batch.patches)} sequences")
