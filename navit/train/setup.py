"""What a run needs before its first step: folder, device, precision, tokenizer, data."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from navit.train.checkpoint import has_checkpoint
from navit.train.config import TrainConfig
from navit.train.ranks import World
from navit.train.stops import from_main
from packer.captions import CaptionTokenizer
from packer.demo import ensure_demo
from packer.errors import SkipSample
from packer.folder import is_flat_folder, is_image_folder
from packer.shards import expand_shards, iter_shard, sample_from_raw

DEMO_FOLDER = Path("data/demo")
RUNS_FOLDER = Path("runs")
TOKENIZER_CAPTIONS = 100_000
"""Captions a tokenizer is trained on: the first ones in shard order."""


def resolve_run(config: TrainConfig, name: str) -> Path:
    """Return the run folder: the one named, the newest one to resume, or a new numbered one.

    A named run that was stopped before its first checkpoint is resumed from its start.

    Raises:
        ValueError: If the folder already holds a run and it is not to be resumed.
        FileNotFoundError: If there is no run to resume.
    """
    found = {
        int(match[1]): path
        for path in RUNS_FOLDER.glob(f"{name}-*")
        if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name))
    }
    if config.resume and config.run is not None:
        if not config.run.is_dir():
            raise FileNotFoundError(f"there is no run in {config.run} to resume. Check the name.")
        return config.run
    if config.resume:
        begun = [number for number, path in found.items() if has_checkpoint(path)]
        if not begun:
            raise FileNotFoundError(
                f"there is no {name} run below {RUNS_FOLDER}/ with a checkpoint to resume. Name a "
                "run with --run, or start without --resume."
            )
        return found[max(begun)]
    if config.run is None:
        return RUNS_FOLDER / f"{name}-{max(found, default=0) + 1:03d}"
    if (config.run / "metrics.jsonl").exists():
        raise ValueError(
            f"{config.run} already holds a run. Continue it with --resume, or name another folder."
        )
    return config.run


def resolve_shards(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Return training and validation shards, making the demonstration set if none are named.

    Raises:
        FileNotFoundError: If a named shard does not exist.
    """
    if is_folder_run(config):
        return list(config.shards), list(config.val)
    if config.shards:
        return expand_shards(config.shards), expand_shards(config.val) if config.val else []
    if config.task == "classify":
        raise ValueError(
            "task 'classify' needs shards with labels (a .cls in each sample), or a folder with "
            "one subfolder a class; the demonstration set has none. Give --shards."
        )
    paths = ensure_demo(DEMO_FOLDER)
    return [str(path) for path in paths.train], [str(path) for path in paths.val]


def is_folder_run(config: TrainConfig) -> bool:
    """Whether a run is over the images of a folder: to classify with one subfolder a class."""
    if config.task == "contrastive" or len(config.shards) != 1:
        return False
    if config.task == "masked":
        return is_flat_folder(config.shards[0]) or is_image_folder(config.shards[0])
    return is_image_folder(config.shards[0])


def resolve_device(config: TrainConfig) -> torch.device:
    """Return the device named, or CUDA where there is one."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_autocast(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Return bf16 where it is asked for, or where the device has instructions for it."""
    if config.precision != "auto":
        return torch.bfloat16 if config.precision == "bf16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    # Without bf16 instructions the CPU emulates them, slower than float32.
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def resolve_tokenizer(config: TrainConfig, run: Path, shards: Sequence[str]) -> CaptionTokenizer:
    """Return the run's tokenizer, training and storing it on the first start."""
    stored = run / "tokenizer.json"
    if config.resume and stored.exists():
        return CaptionTokenizer.from_file(stored)
    if config.tokenizer is not None:
        tokenizer = CaptionTokenizer.from_file(config.tokenizer)
    else:
        captions = itertools.islice(_captions(config, shards), TOKENIZER_CAPTIONS)
        tokenizer = CaptionTokenizer.train(captions, config.vocab_size)
    run.mkdir(parents=True, exist_ok=True)
    tokenizer.save(stored)
    return tokenizer


def tokenizer_of_all(
    config: TrainConfig, run: Path, shards: Sequence[str], world: World
) -> CaptionTokenizer:
    """Return on every rank the tokenizer that rank 0 resolves, and no other rank trains."""
    return from_main(world, lambda: resolve_tokenizer(config, run, shards))


def _captions(config: TrainConfig, shards: Sequence[str]) -> Iterator[str]:
    for path in shards:
        for raw in iter_shard(path, on_problem=lambda cause, detail: None):
            try:
                sample = sample_from_raw(raw, config=config.packer, need="caption")
            except SkipSample:
                continue  # counted when the training stream meets it
            yield sample["caption"]
