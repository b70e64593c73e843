"""Other programs that pack or prepare images, where the benchmark environment has them.

`make bench-setup` builds that environment; in a plain `.venv` the benchmarks run without peers
and say so.
"""

import inspect
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module, metadata
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Place = Callable[[list[int], int], list[int]]
"""(lengths, L) -> tokens in each sequence."""
Prepare = Callable[[bytes], Tensor]
"""Encoded image -> its patches, without padding."""
Loss = Callable[..., Tensor]
"""Image vectors, text vectors, scale and, for the sigmoid, bias -> loss."""

PLACERS = {
    "trl bfd, 1000 a batch": "trl",
    "trl bfd, whole set": "trl",
    "grain first fit, 64": "grain",
    "grain best fit, 64": "grain",
    "vit-pytorch": "vit-pytorch",
}
"""Packers of other programs, and the package each is from."""
PREPARERS = {"hf_torchvision": "torchvision", "timm": "timm"}
"""Image paths of other programs, and the package each needs."""
LOSSES = {"open_clip": "open_clip_torch"}
"""Contrastive losses of other programs, and the package each is from."""
_PATCH_SIZE = 16


@cache
def is_there(package: str) -> bool:
    """Whether a package is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing(peers: dict[str, str]) -> str:
    """Say which packages are missing and where they would be found; "" if none is."""
    names = sorted({package for package in peers.values() if not is_there(package)})
    return f"without {', '.join(names)}: `make bench-setup` installs peers" if names else ""


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    names = ["trl", "datasets", "grain", "vit-pytorch", "timm", "torchvision", "transformers"]
    names += LOSSES.values()
    return {name: metadata.version(name) for name in names if is_there(name)}


# Placement


def placer(name: str) -> tuple[Callable[[Any, int], list[int]], Callable[[list[int], int], Any]]:
    """Return a peer's packer and what prepares its input, which is not timed.

    The second makes of (lengths, L) what the first takes in place of the lengths.
    """
    if name.startswith("trl"):
        return _pack_trl, partial(_trl_tables, batch=1000 if "1000" in name else None)
    if name.startswith("grain"):
        return partial(_pack_grain, best="best" in name), _grain_source
    return _pack_vit_pytorch, _vit_pytorch_images


def _quiet_hub() -> None:
    # These packages look for accelerators and for the network when they are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="(trl|datasets|grain|multiprocess).*")


def _trl_tables(lengths: list[int], seq_len: int, *, batch: int | None) -> list[Any]:
    _quiet_hub()
    import_torchvision()  # which trl imports through transformers
    pa = import_module("pyarrow")
    size = batch or len(lengths)
    tables = []
    for start in range(0, len(lengths), size):
        part = lengths[start : start + size]
        offsets = np.cumsum([0, *part])
        # One byte a token: the rows it moves along are as light as they can be.
        tokens = pa.array(np.zeros(offsets[-1], np.int8))
        tables.append(pa.table({"tokens": pa.LargeListArray.from_arrays(offsets, tokens)}))
    return tables


def _pack_trl(tables: list[Any], seq_len: int) -> list[int]:
    pack = import_module("trl.data_utils")._pack_bfd
    filled: list[int] = []
    for table in tables:
        offsets = pack(table, seq_len)["tokens"].combine_chunks().offsets.to_numpy()
        filled += np.diff(offsets).tolist()
    return filled


def _grain_source(lengths: list[int], seq_len: int) -> Any:
    grain = import_module("grain")
    tokens = [np.ones(length, np.int8) for length in lengths]
    return grain.MapDataset.source(tokens).map(lambda values: {"tokens": values})


def _pack_grain(source: Any, seq_len: int, *, best: bool) -> list[int]:
    experimental = import_module("grain.experimental")
    kind = "BestFitPackIterDataset" if best else "FirstFitPackIterDataset"
    packed = getattr(experimental, kind)(
        source.to_iter_dataset(),
        length_struct={"tokens": seq_len},
        num_packing_bins=64,
        shuffle_bins=False,
    )
    return [int(row["tokens"].sum()) for row in packed]


def _vit_pytorch_images(lengths: list[int], seq_len: int) -> list[Tensor]:
    # It reads only the shapes: a 1 x n patch image of one byte, seen n * 16 times.
    pixel = torch.zeros((), dtype=torch.uint8)
    side = _PATCH_SIZE
    return [pixel.expand(3, side, side * length) for length in lengths]


def _pack_vit_pytorch(images: list[Tensor], seq_len: int) -> list[int]:
    group = import_module("vit_pytorch.na_vit").group_images_by_max_seq_len
    groups = group(images, patch_size=_PATCH_SIZE, max_seq_len=seq_len)
    return [sum(image.shape[-1] // _PATCH_SIZE for image in images) for images in groups]


# From bytes to patches


def preparer(name: str, max_tokens: int) -> Prepare:
    """Return a peer's image path at a token budget: float patches, unpadded."""
    import_torchvision()
    if name == "timm":
        factory = import_module("timm.data.transforms_factory")
        transform = factory.transforms_imagenet_eval(
            naflex=True,
            patch_size=_PATCH_SIZE,
            max_seq_len=max_tokens,
            interpolation="bicubic",
            patchify=True,
        )
        return partial(_timm, transform)
    siglip2 = import_module("transformers.models.siglip2.image_processing_siglip2")
    processor = siglip2.Siglip2ImageProcessor(patch_size=_PATCH_SIZE, max_num_patches=max_tokens)
    return partial(_hf, processor)


def _timm(transform: Callable[[Image.Image], dict[str, Tensor]], data: bytes) -> Tensor:
    # Its dataset readers open and convert; the transform resizes, normalises and cuts.
    return transform(Image.open(BytesIO(data)).convert("RGB"))["patches"]


def _hf(processor: Callable[..., dict[str, Tensor]], data: bytes) -> Tensor:
    found = processor(images=[Image.open(BytesIO(data))], return_tensors="pt")
    # A view: the padding is made all the same, as its users get it.
    return found["pixel_values"][0, : int(found["pixel_attention_mask"].sum())]


# Losses


def open_clip_softmax() -> Loss:
    """Return open_clip's `ClipLoss`: (image, text, scale) -> loss, on one rank."""
    loss: Loss = _open_clip_losses().ClipLoss()
    return loss


def open_clip_sigmoid(chunk_size: int) -> tuple[Loss, bool]:
    """Return open_clip's `SigLipLoss`, and whether this version computes it in chunks.

    Its main branch takes a chunk size (pull request 1145); release 3.3.0 does not.

    Args:
        chunk_size: Rows of images a chunk, where there are chunks.
    """
    loss = _open_clip_losses().SigLipLoss
    if "chunk_size" in inspect.signature(loss).parameters:
        return loss(chunk_size=chunk_size), True
    return loss(), False


def _open_clip_losses() -> Any:
    _quiet_hub()
    import_torchvision()  # which its transforms import
    return import_module("open_clip.loss")


@cache
def import_torchvision() -> object:
    """Import torchvision, which its wheel cannot do beside CPU torch without help.

    Its compiled operators do not load there, and it describes two of them when it is imported.

    Returns:
        What keeps these two defined.
    """
    try:
        return import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")
        return library
