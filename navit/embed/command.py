"""`navit embed`: a checkpoint and a million images in, vectors with their keys out."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from navit.embed.config import EmbedConfig
from navit.embed.embedder import Embedder
from navit.embed.files import OutputFiles, output_files
from navit.embed.inputs import Inputs, find_inputs
from navit.embed.parts import Failure, Part, load_parts
from navit.embed.results import count
from navit.embed.source import fingerprint
from navit.embed.store import VectorStore, VectorType
from navit.serialize import to_plain
from packer.batch import BatchStats
from packer.errors import CAUSES

_LOG_SECONDS = 30.0  # between lines of progress where no terminal shows a bar


@dataclass(frozen=True)
class EmbedCommand:
    """Embed folders, lists and tar shards of images; run again, it goes on where it was stopped."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder or one of its checkpoints; a folder of weights, saved here or by Hugging Face's
    transformers (SigLIP 2, SigLIP, CLIP); or a hub id."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of images, image files, tar shards (brace ranges, URLs and pipe: commands too), and
    text files with one path a line; in any mixture."""
    out: Path
    """NAME.npy with the keys in NAME.keys.txt, NAME.parquet with both, or a folder."""
    dtype: VectorType = "float32"
    """Type of the stored values."""
    embed: tyro.conf.OmitArgPrefixes[EmbedConfig] = field(default_factory=EmbedConfig)
    """How images become vectors."""
    chunk_size: int = 1024
    """Images packed and stored together; a kill loses the chunks in work, one a process."""
    raw_weights: bool = False
    """Use a run's weights of the last step and not their running average."""
    overwrite: bool = False
    """Begin anew, whatever is there."""
    progress: Literal["auto", "off"] = "auto"
    """"auto" shows a bar in a terminal and a line every 30 seconds elsewhere."""


@dataclass(frozen=True)
class EmbedResult:
    """What one call did."""

    files: OutputFiles
    """Where the output is."""
    rows: int
    """Vectors in the output."""
    dim: int
    """D."""
    causes: Mapping[str, int]
    """Images without a vector, by cause."""
    stats: BatchStats
    """Counts of what this call embedded."""
    seconds: float
    """Time it took, reading included, loading the model not."""

    @property
    def failures(self) -> int:
        """Images without a vector."""
        return sum(self.causes.values())


def run_embed(command: EmbedCommand) -> EmbedResult:
    """Embed everything that is not embedded yet.

    Raises:
        ValueError: If a setting or input is wrong, or the output is another one's.
        FileNotFoundError: If an input or the checkpoint does not exist.
        ConnectionError: If a hub id cannot be resolved.
    """
    if not command.inputs:
        raise ValueError("at least one input must be given: a folder, a list, an image or shards.")
    files = output_files(command.out)
    with _bar(command, desc="listing shards", unit="shard", delay=1, leave=False) as bar:
        inputs = find_inputs(
            command.inputs, chunk_size=command.chunk_size, on_shard=lambda shard: bar.update()
        )
    embedder = Embedder(command.checkpoint, command.embed, averaged=not command.raw_weights)
    workers = command.embed.command_workers(embedder.device)
    _say(_describe_inputs(inputs))
    _say(f"{embedder.describe()}; {workers} worker{'' if workers == 1 else 's'}")
    store = VectorStore(
        files,
        _identity(command, embedder, inputs),
        dim=embedder.dim,
        dtype=command.dtype,
        num_chunks=len(inputs.chunks),
        overwrite=command.overwrite,
    )
    try:
        return _run(command, embedder, inputs, store, workers)
    finally:
        store.close()


def format_result(result: EmbedResult) -> str:
    """Lay out what a call did, for the terminal."""
    files, stats, total = result.files, result.stats, result.rows + result.failures
    lines = [f"images    {result.rows:,} of {total:,} embedded"]
    if result.failures:
        lines[0] += f", {result.failures:,} failed"
        for cause, number in sorted(result.causes.items(), key=lambda item: -item[1]):
            meaning = CAUSES.get(cause, "")
            lines.append(f"          {number:>9,}  {cause:<18} {meaning}".rstrip())
        lines.append(f"          listed in {files.failures}")
    if stats.samples_read:
        seconds = max(result.seconds, 1e-9)
        images, tokens = stats.samples_read / seconds, stats.tokens / seconds
        mean, padding = stats.tokens / max(stats.images, 1), 100 * stats.padding
        lines.append(
            f"speed     {images:,.1f} images/s, {tokens:,.0f} tokens/s ({mean:.0f} tokens an "
            f"image, padding {padding:.2f} %), {seconds:,.1f} s"
        )
    else:
        lines.append("speed     nothing was left to do")
    lines.append(f"vectors   {files.vectors}  ({result.rows:,}, {result.dim})")
    if files.keys is not None:
        lines.append(f"keys      {files.keys}  one a line, in the order of the vectors")
    return "\n".join(lines)


def _run(
    command: EmbedCommand, embedder: Embedder, inputs: Inputs, store: VectorStore, workers: int
) -> EmbedResult:
    if store.is_finished:
        _say(f"{store.files.vectors} is finished already; --overwrite makes it anew.")
        return _result(store, BatchStats(), 0.0)
    first = store.done.chunks
    failed = store.done.failures
    before = store.done.rows + failed
    if first:
        _say(f"going on after chunk {first} of {len(inputs.chunks)}: {before:,} images are done.")
    stats, started = BatchStats(), time.perf_counter()
    parts = load_parts(
        inputs.chunks,
        embedder.packing,
        batch_tokens=embedder.batch_tokens,
        workers=workers,
        first=first,
        pin_memory=embedder.device.type == "cuda",
    )
    with _bar(command, desc="embedding", unit="img", total=inputs.count, initial=before) as bar:

        def show(part: Part) -> None:
            nonlocal stats
            stats = count(stats, part)
            tokens = stats.tokens / (time.perf_counter() - started)
            lost = failed + sum(stats.skipped.values())
            bar.set_postfix_str(
                f"{tokens:,.0f} tokens/s, padding {stats.padding:.1%}, failed {lost:,}",
                refresh=False,
            )
            bar.update(len(part.indices) + len(part.failures))

        for chunk in embedder.run(parts, first=first, on_part=show):
            store.append(chunk.vectors.numpy(), chunk.keys, chunk.failures)
            if chunk.number == 0 and len(chunk.failures) == command.chunk_size:
                _refuse_all(store, chunk.failures)
    seconds = time.perf_counter() - started
    store.finish(_summary(stats, seconds, embedder))
    return _result(store, stats, seconds)


def _refuse_all(store: VectorStore, failures: Sequence[Failure]) -> None:
    """Stop where nothing of a whole first chunk can be read: it is the list that is wrong."""
    if store.num_chunks == 1:
        return  # then that is the result
    store.discard()
    first = failures[0]
    raise ValueError(
        f"an image of the first {len(failures)} at least must be readable; none is. The first: "
        f"{first.key}: {first.cause}: {first.detail}. Paths in a list are relative to the current "
        "folder."
    )


def _identity(command: EmbedCommand, embedder: Embedder, inputs: Inputs) -> dict[str, Any]:
    """Say what the output depends on; device and number of processes are not among it."""
    packing = to_plain(embedder.packing)
    return {
        "model": fingerprint(embedder.model),
        "inputs": {"sha256": inputs.fingerprint, "images": inputs.count},
        "packing": packing,
        "batch_tokens": embedder.batch_tokens,
        "chunk_size": command.chunk_size,
        "normalize": command.embed.normalize,
        "precision": "fp32" if embedder.dtype is None else "bf16",
    }


def _summary(stats: BatchStats, seconds: float, embedder: Embedder) -> dict[str, Any]:
    return {
        "model": embedder.describe(),
        "last_call": {
            "images": stats.images,
            "tokens": stats.tokens,
            "seconds": round(seconds, 3),
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow")},
    }


def _result(store: VectorStore, stats: BatchStats, seconds: float) -> EmbedResult:
    return EmbedResult(store.files, store.done.rows, store.dim, store.done.causes, stats, seconds)


def _describe_inputs(inputs: Inputs) -> str:
    chunks = f"{len(inputs.chunks):,} chunk{'' if len(inputs.chunks) == 1 else 's'}"
    if inputs.count is None:
        known = f"{chunks}; URLs and commands do not tell their number of images"
    else:
        known = f"{inputs.count:,} images in {chunks}"
    return known + (f"; {inputs.ignored:,} other files left out" if inputs.ignored else "")


def _bar(command: EmbedCommand, **settings: Any) -> Any:
    seconds = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
    return tqdm(
        **settings,
        disable=command.progress == "off",
        mininterval=seconds,
        maxinterval=max(seconds, 10.0),
        smoothing=0.05,
        dynamic_ncols=True,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
