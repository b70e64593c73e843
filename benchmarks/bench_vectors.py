"""Encoded images to vectors: `navit.Embedder` beside Hugging Face's processor and model.

Both sides have the same weights (SigLIP 2 base, random), the same bytes, token budget and number of
threads, in float32; loading the model is not timed. Hugging Face's side is its image processor, of
torchvision (its default) and of Pillow, and its model on padded rows, at the batch size it is best
at here. Ours is measured as it is for SigLIP 2 (``decode="full"``, ``resize="fill_budget"``: the
same grids), and as the paper has it (``decode="reduced"``, ``resize="shrink_only"``: an image below
the budget keeps its size), where the vectors are of other pixels: their cosine is in the rows.

Images given are measured twice: those of original size, and all as they are stored, scaled-down
ones too. Of either, few are taken, at the quantiles of the number of tokens they have unenlarged.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.bench_image_path import generated, jpegs
from benchmarks.harness import Paired, paired_ratio
from navit.embed import EmbedConfig, Embedder, Embeddings
from navit.pretrained import load_siglip2
from packer.decode import read_size
from packer.plan.resize import plan_resize

PATCH_SIZE, MAX_TOKENS, THREADS = 16, 256, 2
PROCESSORS = {"HF torchvision": "torchvision", "HF Pillow": "transformers"}
"""Image processors of Hugging Face, its default first, and the package each needs."""
BATCH_SIZES = (1, 4, 12)
"""Batch sizes Hugging Face's side is tried with."""
AS_THEIRS = EmbedConfig(max_tokens=MAX_TOKENS, resize="fill_budget", decode="full")
AS_THE_PAPER = EmbedConfig(max_tokens=MAX_TOKENS, resize="shrink_only", decode="reduced")
_BASE = {"patch_size": PATCH_SIZE, "num_patches": MAX_TOKENS}
_TINY = {
    **_BASE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_SIZES = ((640, 480), (480, 360), (320, 240), (160, 120))


@dataclass(frozen=True)
class Case:
    """One comparison."""

    kind: str
    """Which images."""
    images: Sequence[bytes]
    """The images, encoded."""
    config: EmbedConfig
    """How ours takes them."""
    processor: str
    """Whose pixels the peer takes."""


def run(quick: bool = False, photos: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Measure both settings of ours against each of Hugging Face's image processors.

    Args:
        quick: A tiny model and a few images, to see that it runs.
        photos: Tars or folders whose JPEGs are used; none draws photo-like ones of several sizes.

    Returns:
        Rows with paired time ratios, images/s and differences of the vectors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _run(_groups(photos, 3 if quick else 12), _TINY if quick else _BASE, quick=quick)
    finally:
        torch.set_num_threads(threads)


def _run(
    groups: dict[str, list[bytes]], shape: dict[str, int], *, quick: bool
) -> list[dict[str, Any]]:
    if left_out := peers.missing(PROCESSORS):
        print(left_out)
    theirs = siglip2(shape)
    ours = load_siglip2(theirs)
    processors = [name for name, package in PROCESSORS.items() if peers.is_there(package)]
    default = processors[0]
    first, *_ = groups
    cases = [Case(first, groups[first], AS_THEIRS, name) for name in processors]
    cases += [Case(kind, images, AS_THE_PAPER, default) for kind, images in groups.items()]
    batch_size = _best_batch_size(theirs, default, groups[first], BATCH_SIZES[: 2 if quick else 3])
    rows = []
    their_vectors: dict[str, Tensor] = {}
    for case in cases:
        row, vectors = _measure(case, theirs, ours, batch_size, pairs=2 if quick else 4)
        if case.config is AS_THEIRS:
            their_vectors[case.processor] = vectors
            apart = _difference(vectors, their_vectors[default])
            row["from_their_default"] = apart["largest_difference"]
        _print_row(row)
        rows.append(row)
    return rows


def _measure(
    case: Case, theirs: nn.Module, ours: nn.Module, batch_size: int, *, pairs: int
) -> tuple[dict[str, Any], Tensor]:
    """Return the row, and the peer's vectors."""
    embedder = Embedder(ours, case.config)
    ours_found: list[Embeddings] = []
    theirs_found: list[Tensor] = []

    def ours_once() -> None:
        ours_found[:] = [embedder.embed(case.images)]

    def theirs_once() -> None:
        theirs_found[:] = [_theirs(theirs, case.processor, case.images, batch_size)]

    timed = paired_ratio(theirs_once, ours_once, pairs=pairs)
    count = len(case.images)
    row = {
        "what": case.kind,
        "images": count,
        "decode": embedder.packing.decode,
        "resize": embedder.packing.resize,
        "peer": case.processor,
        "max_tokens": MAX_TOKENS,
        "their_batch_size": batch_size,
        "our_tokens_an_image": ours_found[0].stats.tokens / count,
        "times_their_speed": timed,
        "our_images_per_s": count / timed.seconds_b,
        "their_images_per_s": count / timed.seconds_a,
        **_difference(ours_found[0].vectors, theirs_found[0]),
    }
    return row, theirs_found[0]


def _difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Compare vectors (N, D), value by value and image by image."""
    apart = found - expected
    cosine = F.cosine_similarity(found.double(), expected.double(), dim=1)
    return {
        "largest_difference": float(apart.abs().max()),
        "largest_difference_to_norm": float((apart.norm(dim=1) / expected.norm(dim=1)).max()),
        "mean_cosine": float(cosine.mean()),
        "least_cosine": float(cosine.min()),
    }


def _print_row(row: dict[str, Any]) -> None:
    timed: Paired = row["times_their_speed"]
    print(
        f"\n{row['what']}: {row['images']} images, {row['decode']} decode, {row['resize']}: "
        f"{row['our_tokens_an_image']:.0f} tokens an image, {row['max_tokens']} of theirs\n"
        f"  times the speed of {row['peer']:15} {timed}\n"
        f"  images/s                           ours {row['our_images_per_s']:.2f}, theirs "
        f"{row['their_images_per_s']:.2f} ({row['their_batch_size']} a batch)\n"
        f"  largest difference of the vectors  {row['largest_difference']:.1e}, "
        f"{row['largest_difference_to_norm']:.1e} of the norm\n"
        f"  cosine, mean and least             {row['mean_cosine']:.6f}, {row['least_cosine']:.6f}",
        flush=True,
    )
    if apart := row.get("from_their_default"):
        print(f"  their own default is from this by  {apart:.1e}", flush=True)


# Hugging Face's side


def siglip2(shape: dict[str, int]) -> nn.Module:
    """Return a `Siglip2VisionModel` of random weights: base size but for what ``shape`` says."""
    if peers.is_there("torchvision"):
        peers.import_torchvision()
    transformers = import_module("transformers")
    torch.manual_seed(0)
    model: nn.Module = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**shape))
    return model.eval()


def _theirs(model: nn.Module, processor: str, images: Sequence[bytes], batch_size: int) -> Tensor:
    prepare = _processor(processor)
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            opened = [Image.open(BytesIO(data)) for data in images[start : start + batch_size]]
            vectors.append(model(**prepare(images=opened, return_tensors="pt")).pooler_output)
    return torch.cat(vectors)


def _processor(name: str) -> Callable[..., dict[str, Tensor]]:
    package = "transformers.models.siglip2"
    settings = {"patch_size": PATCH_SIZE, "max_num_patches": MAX_TOKENS}
    made: Callable[..., dict[str, Tensor]]
    if PROCESSORS[name] == "torchvision":
        module = import_module(f"{package}.image_processing_siglip2")
        made = module.Siglip2ImageProcessor(**settings)
    else:
        module = import_module(f"{package}.image_processing_pil_siglip2")
        made = module.Siglip2ImageProcessorPil(**settings)
    return made


def _best_batch_size(
    model: nn.Module, processor: str, images: Sequence[bytes], sizes: Iterable[int]
) -> int:
    seconds: dict[int, float] = {}
    _theirs(model, processor, images[:1], 1)
    for size in sizes:
        start = perf_counter()
        _theirs(model, processor, images, size)
        seconds[size] = perf_counter() - start
    best = min(seconds, key=lambda size: seconds[size])
    told = ", ".join(f"{size}: {len(images) / time:.2f}" for size, time in seconds.items())
    print(f"{processor}, images/s by batch size: {told}; {best} is taken", flush=True)
    return best


# Images


def _groups(photos: Sequence[Path], count: int) -> dict[str, list[bytes]]:
    """Return images by what they are; of the first group the vectors are to be the same."""
    if not photos:
        each = -(-count // len(_SIZES))
        drawn = [image for size in _SIZES for image in generated(each, size)]
        return {
            f"drawn, {_SIZES[0][0]} to {_SIZES[-1][0]} pixels wide": evenly_spaced(drawn, count)
        }
    originals = list(jpegs(photos))
    stored = list(jpegs(photos, original=False))
    if not originals:
        raise ValueError(
            f"photos must hold RGB JPEGs of original size; {', '.join(map(str, photos))} hold none."
        )
    groups = {"of original size": evenly_spaced(originals, count)}
    if len(stored) > len(originals):
        groups["all, as stored"] = evenly_spaced(stored, count)
    return groups


def evenly_spaced(images: Sequence[bytes], count: int) -> list[bytes]:
    """Take ``count`` images at the quantiles of the number of tokens they have unenlarged."""
    by_tokens = sorted(images, key=_num_tokens)
    taken = min(count, len(images))
    return [by_tokens[(2 * i + 1) * len(images) // (2 * taken)] for i in range(taken)]


def _num_tokens(data: bytes) -> int:
    size = read_size(data).size
    return plan_resize(size, patch_size=PATCH_SIZE, max_tokens=MAX_TOKENS).num_tokens
