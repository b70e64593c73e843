"""Equal compute: how many steps of an arm cost a budget of FLOPs, from sizes and captions alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from benchmarks.experiments.arms import Arm, Scale, packing
from navit.model.config import CLIPConfig
from navit.train.config import TrainConfig
from navit.train.flops import STEP_OVER_FORWARD, image_flops, text_flops
from packer.captions import CaptionTokenizer
from packer.decode import read_size
from packer.errors import SkipSample
from packer.plan.many import plan_patches
from packer.plan.place import pack_lengths
from packer.shards import IMAGE_EXTENSIONS, expand_shards, iter_shard

MAX_SAMPLES = 2000
"""Samples read for an estimate, the first ones."""
DRAWS = 20_000
"""Images planned for it; the samples repeat."""


@dataclass(frozen=True)
class Samples:
    """What of a data set costs compute."""

    sizes: npt.NDArray[np.int64]
    """int64 (n, 2) heights and widths in pixels."""
    captions: tuple[int, ...]
    """Tokens of each caption."""


@dataclass(frozen=True)
class Plan:
    """A run within a budget."""

    steps: int
    """Optimizer steps."""
    images: int
    """Images it is expected to see."""
    flops: float
    """Expected operations, forward and backward."""


def read_samples(shards: Sequence[str], tokenizer: CaptionTokenizer, max_tokens: int) -> Samples:
    """Read sizes and caption lengths of a data set's first images.

    Raises:
        ValueError: If the shards hold no image with a caption.
    """
    sizes: list[tuple[int, int]] = []
    texts: list[str] = []
    raws = (
        raw
        for shard in expand_shards(list(shards))
        for raw in iter_shard(shard, on_problem=lambda cause, detail: None)
    )
    for raw in islice(raws, MAX_SAMPLES):
        image = next((raw.members[name] for name in IMAGE_EXTENSIONS if name in raw.members), None)
        text = raw.members.get("txt", b"").decode("utf-8", "replace").strip()
        if image is None or not text:
            continue
        try:
            sizes.append(read_size(image).size)
        except SkipSample:
            continue
        texts.append(text)
    if not sizes:
        raise ValueError(
            f"the shards must hold images with captions; none was found in {list(shards)}. Check "
            "them with: python -m packer check SHARDS"
        )
    lengths = tuple(len(ids) for ids in tokenizer.encode(texts, max_tokens))
    return Samples(np.array(sizes, np.int64), lengths)


def plan_run(config: CLIPConfig, arm: Arm, scale: Scale, samples: Samples, budget: float) -> Plan:
    """Choose the steps of an arm that cost a budget.

    Images are planned and placed as training does; schedules of the drop rate are stretched over
    the images planned, as they are over a run's.

    Args:
        config: The model.
        arm: The arm.
        scale: Its data set's settings.
        samples: Images of the data set; squares for a square arm.
        budget: Operations of the whole run, forward and backward.

    Raises:
        ValueError: If the budget does not pay for a step.
    """
    repeated = np.resize(np.arange(len(samples.sizes)), DRAWS)
    packed = packing(arm, scale, images=DRAWS)
    kept, patches = plan_patches(samples.sizes[repeated], packed, np.random.default_rng(0))
    captions = np.array(samples.captions)[repeated].tolist()
    forward = forward_flops(config, kept.tolist(), captions, patches.tolist())
    per_image = STEP_OVER_FORWARD * forward / DRAWS
    sequences = pack_lengths(kept.tolist(), scale.seq_len)
    per_step = scale.sequences * DRAWS / len(sequences)
    steps = round(budget / per_image / per_step)
    if steps < 1:
        raise ValueError(
            f"the budget must pay for a step ({per_image * per_step:.3g} FLOPs of arm "
            f"{arm.name}); got {budget:.3g}. Raise --minutes-per-run or --flops."
        )
    images = round(steps * per_step)
    return Plan(steps, images, steps * per_step * per_image)


def forward_flops(
    config: CLIPConfig,
    tokens: Sequence[int],
    captions: Sequence[int],
    patch_sizes: Sequence[int],
) -> int:
    """Return the operations of both towers on images and captions of so many tokens each.

    An image's patches are of the size given for it.
    """
    projections = config.vision.width + config.text.width
    by_size: dict[int, list[int]] = {}
    for size, length in zip(patch_sizes, tokens, strict=True):
        by_size.setdefault(size, []).append(length)
    return (
        sum(
            image_flops(replace(config.vision, patch_size=size, patch_buffer=None), lengths)
            for size, lengths in by_size.items()
        )
        + text_flops(config.text, captions)
        + 2 * len(tokens) * projections * config.embed_dim
    )


def with_text(config: TrainConfig, tokenizer: CaptionTokenizer) -> CLIPConfig:
    """Return the model as training makes it: text length and vocabulary filled in."""
    text = replace(
        config.model.text,
        vocab_size=tokenizer.vocab_size,
        max_tokens=config.packer.max_text_tokens,
    )
    return replace(config.model, text=text)
