"""A training step with its loader against the same step on preloaded batches.

ViT-Ti and a text tower of its size, contrastive, AdamW, bf16 autocast where the processor has
bf16; the paper's mix of images (side U(64, 256), half the tokens dropped; NaViT, arXiv:2307.06304,
section 3), decoded from JPEGs of 640 x 480 pixels by one `DataLoader` worker. Held equal: the
network, the batches (the stream gives the same ones every time) and the number of torch threads of
the training process. Blocks of steps on either side alternate; a block's first steps, in which the
worker starts and fills its queue, are not timed. Wanted: at most 1.05, with one thread fewer than
cores, so that the worker has a core. With a thread on every core, as torch does by itself, the
worker takes its share from the model.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.bench_image_path import generated, jpegs
from benchmarks.harness import paired_ratio
from navit.loss import contrastive_loss
from navit.model import CLIP, CLIPConfig, NaViTConfig, TextConfig
from navit.train.optim import OptimConfig, build_optimizers
from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.plan.drop import ConstantDrop
from packer.plan.resize import UniformSide
from packer.shards import write_shards
from packer.stream import PackedStream

_CONFIG = PackerConfig(
    patch_size=16,
    seq_len=1024,
    max_tokens=256,
    resolution=UniformSide(64, 256),
    token_drop=ConstantDrop(0.5),
)
_UNTIMED = 3
"""Steps at the start of a block: one in which the worker starts, two for the two batches that it
makes ahead."""


@dataclass
class Steps:
    """A model with its optimizer, and what its steps cost."""

    model: CLIP
    tokenizer: CaptionTokenizer
    shards: list[str]
    sequences: int
    """Sequences of a batch."""
    steps: int
    """Timed steps of a block."""
    autocast: torch.dtype | None
    """bfloat16, or None for float32."""
    waits: list[float] = field(default_factory=list)
    """Share of each block with the loader that was spent waiting for batches."""

    def __post_init__(self) -> None:
        self.optimizers = build_optimizers(self.model, OptimConfig(optimizer="adamw"))
        self.preloaded = list(islice(self.loader(workers=0), _UNTIMED + self.steps))

    def loader(self, workers: int = 1) -> Iterable[PackedBatch]:
        """Make the loader, from the stream's start."""
        stream = PackedStream(
            self.shards,
            _CONFIG,
            sequences_per_batch=self.sequences,
            tokenizer=self.tokenizer,
            num_streams=1,
        )
        return DataLoader(stream, batch_size=None, num_workers=workers)

    def with_loader(self) -> float:
        """Run a block whose batches a worker makes meanwhile; return its seconds."""
        seconds, waited = self._block(self.loader())
        self.waits.append(waited / seconds)
        return seconds

    def with_preloaded(self) -> float:
        """Run a block on batches that are in memory; return its seconds."""
        return self._block(self.preloaded)[0]

    def _block(self, batches: Iterable[PackedBatch]) -> tuple[float, float]:
        """Return the seconds of a block's timed steps, and those of them spent waiting."""
        iterator = iter(batches)
        for batch in islice(iterator, _UNTIMED):
            self._step(batch)
        waited = 0.0
        start = perf_counter()
        for _ in range(self.steps):
            asked = perf_counter()
            batch = next(iterator)
            waited += perf_counter() - asked
            self._step(batch)
        return perf_counter() - start, waited

    def _step(self, batch: PackedBatch) -> None:
        autocast = torch.autocast("cpu", self.autocast) if self.autocast else nullcontext()
        with autocast:
            output = self.model(batch)
        loss = contrastive_loss(output.image, output.text, output.logit_scale)
        self.optimizers.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers.step()


def run(quick: bool = False, photos: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Measure the step with one thread fewer than cores, and with as many as cores.

    Args:
        quick: A small model and few steps, to see that it runs.
        photos: Tars or folders whose JPEGs are used; none generates photo-like ones of
            640 x 480 pixels.
    """
    count, size = (24, (160, 120)) if quick else (100, (640, 480))
    images = list(islice(jpegs(photos), count)) if photos else generated(count, size)
    cores = os.cpu_count() or 1
    # The first has its wanted figure; the second is what a user gets who sets nothing.
    cases = [(max(1, cores - 1), 2 if quick else 6)]
    if not quick and cores > 1:
        cases.append((cores, 4))
    print(f"A contrastive training step of {'tiny' if quick else 'ViT-Ti'}, {cores} cores:")
    threads = torch.get_num_threads()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        captions = [f"photograph number {number}" for number in range(len(images))]
        shards = write_pairs(images, captions, Path(folder))
        try:
            for num_threads, pairs in cases:
                torch.set_num_threads(num_threads)
                steps = make_steps(shards, captions, quick=quick)
                rows.append(_measure(steps, num_threads, pairs))
        finally:
            torch.set_num_threads(threads)
    return rows


def make_steps(shards: list[str], captions: list[str], *, quick: bool) -> Steps:
    """Make the model, its tokenizer and the batches in memory."""
    size, steps = ("tiny", 1) if quick else ("ti", 6)
    tokenizer = CaptionTokenizer.train(captions, vocab_size=512)
    text = TextConfig.named(size, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(vision=NaViTConfig.named(size, patch_size=16), text=text))
    sequences = 1 if quick else 2
    return Steps(model, tokenizer, shards, sequences, steps, None if quick else autocast_dtype())


def autocast_dtype() -> torch.dtype | None:
    """Return bfloat16 where the processor has instructions for it, as the trainer does."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return torch.bfloat16 if available and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def write_pairs(images: Sequence[bytes], captions: Sequence[str], folder: Path) -> list[str]:
    """Write images and their captions into two shards, and return the paths."""
    content = (
        {"key": f"{number:06}", "image": image, "caption": caption}
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    )
    return write_shards(content, folder, samples_per_shard=-(-len(images) // 2))


def _measure(steps: Steps, threads: int, pairs: int) -> dict[str, Any]:
    ratio = paired_ratio(
        steps.with_loader, steps.with_preloaded, pairs=pairs, warmup=0, self_timed=True
    )
    used = steps.preloaded[_UNTIMED:]
    images, tokens = (
        sum(getattr(batch.stats, name) for batch in used) for name in ("images", "tokens")
    )
    waits = sorted(steps.waits)
    row = {
        "torch_threads": threads,
        "workers": 1,
        "precision": "bfloat16 autocast" if steps.autocast else "float32",
        "steps_a_block": steps.steps,
        "images_a_step": images / steps.steps,
        "kept_tokens_a_step": tokens / steps.steps,
        "step_with_loader_to_preloaded": ratio,
        "images_per_second": images / ratio.seconds_a,
        "kept_tokens_per_second": tokens / ratio.seconds_a,
        "data_wait_share": waits[len(waits) // 2],
        "data_wait_share_max": waits[-1],
    }
    print(
        f"{threads} torch threads, 1 worker, {row['precision']}: with loader / preloaded {ratio}; "
        f"{row['images_per_second']:.0f} images/s, {row['kept_tokens_per_second']:,.0f} kept "
        f"tokens/s, waiting for data {row['data_wait_share']:.2%}",
        flush=True,
    )
    return row
