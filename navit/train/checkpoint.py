"""Checkpoints: a folder that is either whole or not there, read on any number of ranks.

    step-00000200/
      tensors/          model, ema and optimizer by parameter name (torch.distributed.checkpoint)
      state.json        everything else: step, configuration, position in the data, random states
      tokenizer.json    or classes.txt

Every rank writes its part of the tensors under a temporary name; rank 0 renames the folder once all
of it is on the disk. A kill or a full disk at any moment leaves the older ones as they were.

The tensors' index is a pickle, as torch writes it: read checkpoints of runs you trust. What is
passed on is `save_pretrained`'s safetensors.
"""

import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from navit.train.ranks import World, alone
from navit.train.stops import from_main

STATE_FILE = "state.json"
TENSORS_FOLDER = "tensors"
Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by group (``model``, ``ema``, ``optimizer``) and name."""


class CheckpointError(OSError):
    """A checkpoint could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds."""

    tensors: Groups
    """Tensors of all groups; sharded ones (`DTensor`) are written by the ranks that hold a part,
    others by one rank."""
    state: dict[str, Any]
    """Everything else, JSON-ready; that of rank 0 is stored."""
    files: dict[str, str] = field(default_factory=dict)
    """Text files stored beside, by name; those of rank 0."""


def save_checkpoint(
    folder: Path, step: int, checkpoint: Checkpoint, *, keep: int = 2, world: World | None = None
) -> Path:
    """Write ``folder/step-<step>`` atomically and remove all but the newest ``keep``.

    Args:
        folder: Where the checkpoints of a run are, on a file system that all ranks see.
        step: Number of the checkpoint.
        checkpoint: What is stored.
        keep: Checkpoints that stay.
        world: The ranks, all of which call this; None is a process alone.

    Raises:
        CheckpointError: If a rank could not write; older checkpoints stay untouched.
        RankFailed: In its place on the other ranks, where it was rank 0 by itself.
    """
    world = alone(torch.device("cpu")) if world is None else world
    partial = folder / f".partial-{step:08d}"
    try:
        with _naming_step(step, folder):
            from_main(world, lambda: _begin(partial))
            _write_tensors(partial / TENSORS_FOLDER, checkpoint.tensors, world)
            return from_main(world, lambda: _finish(folder, partial, step, checkpoint, keep))
    finally:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
    partial.mkdir(parents=True)


def _write_tensors(folder: Path, groups: Groups, world: World) -> None:
    flat = {
        f"{group}/{name}": value for group, found in groups.items() for name, value in found.items()
    }
    with _quietly():
        save(
            flat,
            storage_writer=_Writer(folder, sync_files=True),
            process_group=world.group,
            no_dist=world.group is None,
        )


def _finish(folder: Path, partial: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write what rank 0 writes alone, and give the folder its name."""
    for name, text in checkpoint.files.items():
        (partial / name).write_text(text)
    (partial / STATE_FILE).write_text(json.dumps(checkpoint.state))
    for path in (*partial.iterdir(), partial):
        _flush(path)
    final = folder / f"step-{step:08d}"
    if final.exists():
        _remove(final)
    partial.rename(final)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    for debris in folder.glob(".partial-*"):  # of a run that was killed while it wrote
        shutil.rmtree(debris, ignore_errors=True)
    return final


class _Writer(FileSystemWriter):
    """Writes a rank's tensors, and says what the system said where that fails."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write them; a full disk is an `OSError`, which torch's archive hides behind its own."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextmanager
def _naming_step(step: int, folder: Path) -> Iterator[None]:
    """Turn what torch and the system say of a failed write into one message."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        causes: dict[int, BaseException] = {0: error}
        if isinstance(error, CheckpointException):
            causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        said = "; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(causes.items()))
        whole = list_checkpoints(folder)
        newest = f"the newest whole one is {whole[-1]}" if whole else "there is none yet"
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise CheckpointError(
            f"the checkpoint of step {step} must be written whole below {folder}; it could not "
            f"({said}), with {free / 2**20:,.1f} MiB free there. Older checkpoints are as they "
            f"were: {newest}. Make room, then go on with --resume."
        ) from error


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; under its own name it is whole or not there at any moment."""
    going = checkpoint.with_name(f".partial-old-{checkpoint.name}")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence torch's remark that a process alone takes part in no exchange."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def has_checkpoint(run: Path) -> bool:
    """Whether a run folder holds a whole checkpoint."""
    return bool(list_checkpoints(run / "checkpoints"))


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


def read_state(path: Path) -> dict[str, Any]:
    """Read what a checkpoint folder holds beside its tensors."""
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    return state


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's index says of a tensor."""

    shape: torch.Size
    """Whole shape, whatever ranks held it."""
    dtype: torch.dtype
    """Type it was stored in."""


def stored_tensors(path: Path) -> dict[str, dict[str, TensorInfo]]:
    """Read from a checkpoint's index which tensors it holds, by group and name.

    Raises:
        ValueError: If the folder is of an earlier version, without an index.
    """
    if not (path / TENSORS_FOLDER).is_dir():
        raise ValueError(
            f"{path} must hold its tensors in a folder {TENSORS_FOLDER}/; there is none. It was "
            "written by an earlier version, or copied in part."
        )
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    index = FileSystemReader(path / TENSORS_FOLDER).read_metadata().state_dict_metadata
    for key, item in index.items():
        assert isinstance(item, TensorStorageMetadata), "only tensors are stored"
        group, _, name = key.partition("/")
        found[group][name] = TensorInfo(item.size, item.properties.dtype)
    return dict(found)


def load_tensors(path: Path, groups: Groups, *, world: World | None = None) -> None:
    """Read tensors of a checkpoint into those given, each rank the parts it holds.

    Args:
        path: The checkpoint folder.
        groups: Tensors to overwrite; of each group all that are stored, with their shapes. They may
            be sharded otherwise than they were when they were stored.
        world: The ranks, all of which call this; None is a process alone.

    Raises:
        ValueError: If names or shapes differ from those stored (nothing is changed then), or a file
            cannot be read.
    """
    world = alone(torch.device("cpu")) if world is None else world
    stored = stored_tensors(path)
    for group, tensors in groups.items():
        expected = {name: tuple(value.shape) for name, value in tensors.items()}
        found = {name: tuple(value.shape) for name, value in stored.get(group, {}).items()}
        if found != expected:
            differing = sorted(dict(expected.items() ^ found.items()))
            raise ValueError(
                f"the {group} tensors of {path} must have the names and shapes of this run's; "
                f"these differ: {', '.join(differing[:5])}. Continue with the settings of the "
                "checkpoint."
            )
    flat = {
        f"{group}/{name}": value
        for group, tensors in groups.items()
        for name, value in tensors.items()
    }
    try:
        with _quietly():
            load(
                flat,
                storage_reader=FileSystemReader(path / TENSORS_FOLDER),
                process_group=world.group,
                no_dist=world.group is None,
            )
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(
            f"every file of {path} must be whole; one could not be read ({cause}). Resume from an "
            "older checkpoint: remove this folder, or name the older one."
        ) from error
