"""Checkpoints: a folder of safetensors and JSON that is either whole or not there.

A checkpoint is written under a temporary name, flushed to disk and renamed, so a kill or a full
disk at any moment leaves the older ones as they were.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "state.json"
FREE_SETTINGS = frozenset(
    {"run", "resume", "shards", "val", "steps", "workers", "device", "eval_every", "tokenizer"}
    | {"checkpoint_every", "keep_checkpoints", "max_bad_losses", "loss_chunk"}
)
"""Settings a continued run may change. Other shards are refused by the stream's own state."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds."""

    tensors: dict[str, dict[str, Tensor]]
    """Named groups of tensors (``model``, ``ema``, ``optimizer``), one file each."""
    state: dict[str, Any]
    """Everything else, JSON-ready: step, configuration, loader state, counters."""
    files: dict[str, str] = field(default_factory=dict)
    """Text files stored beside, by name; not read back by `load_checkpoint`."""


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write ``folder/step-<step>`` atomically and remove all but the newest ``keep``.

    Raises:
        OSError: If the disk is full or not writable; older checkpoints stay untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for name, tensors in checkpoint.tensors.items():
            # Clones untie shared storage, which safetensors refuses.
            save_file(
                {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
                partial / f"{name}.safetensors",
            )
        for name, text in checkpoint.files.items():
            (partial / name).write_text(text)
        (partial / STATE_FILE).write_text(json.dumps(checkpoint.state))
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        _flush(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    for debris in folder.glob(".partial-*"):  # of a run that was killed while it wrote
        shutil.rmtree(debris, ignore_errors=True)
    return final


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; under its own name it is whole or not there at any moment."""
    going = checkpoint.with_name(f".partial-old-{checkpoint.name}-{os.getpid()}")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going)


def has_checkpoint(run: Path) -> bool:
    """Whether a run folder holds a whole checkpoint."""
    return bool(list_checkpoints(run / "checkpoints"))


def check_same_run(stored: Any, given: Any, path: Path) -> None:
    """Refuse to continue a run with settings that would make it another one.

    Args:
        stored: The checkpoint's configuration, as `navit.serialize.to_plain` gives it.
        given: The configuration to continue with.
        path: The checkpoint, for the message.

    Raises:
        ValueError: If they differ in more than `FREE_SETTINGS`; the message lists where.
    """
    differing = [
        f"{name} was {a!r} and is {b!r}"
        for name, a, b in _differences(stored, given, "")
        if name.split(".")[0] not in FREE_SETTINGS
    ]
    if differing:
        raise ValueError(
            f"a run continues with its own settings, and {path} has others: "
            f"{'; '.join(differing)}. Give the run's settings (they are in its config.json), or "
            "start a new run."
        )


def _differences(a: Any, b: Any, name: str) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for key in sorted({*a, *b})
            for found in _differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if a == b else [(name, a, b)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at ``path``: itself, or the newest one of a run or checkpoint folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    if (path / STATE_FILE).is_file():
        return path
    for folder in (path / "checkpoints", path):
        found = list_checkpoints(folder)
        if found:
            return found[-1]
    raise FileNotFoundError(
        f"no checkpoint found in {path}: expected {STATE_FILE}, or step-* folders holding it, "
        "there or in its checkpoints folder. Give a run folder or a checkpoint folder."
    )


def load_checkpoint(path: Path, *, groups: tuple[str, ...] | None = None) -> Checkpoint:
    """Read a checkpoint folder, or only some of its groups of tensors."""
    state = json.loads((path / STATE_FILE).read_text())
    files = sorted(path.glob("*.safetensors"))
    tensors = {
        file.stem: load_file(file) for file in files if groups is None or file.stem in groups
    }
    return Checkpoint(tensors=tensors, state=state)


def rng_state() -> list[int]:
    """Return torch's CPU random state, JSON-ready."""
    return [int(byte) for byte in torch.get_rng_state()]


def set_rng_state(state: list[int]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(torch.tensor(state, dtype=torch.uint8))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
