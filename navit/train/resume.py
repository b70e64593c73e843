"""What a resumed run takes over beside its tensors: settings, random states."""

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from navit.serialize import from_plain, to_plain
from navit.train.checkpoint import TensorInfo
from navit.train.config import TrainConfig
from navit.train.optim import Optimizers
from navit.train.ranks import World

FREE_SETTINGS = frozenset(
    {"run", "resume", "shards", "val", "steps", "workers", "num_streams", "device", "eval_every"}
    | {"checkpoint_every", "keep_checkpoints", "max_bad_losses", "loss_chunk", "tokenizer"}
    | {"parallel", "time_limit", "compile", "teacher"}
)
"""Settings a continued run may change. Other shards are refused by the stream's own state."""


def check_same_run(stored: Any, given: Any, path: Path) -> None:
    """Refuse to continue a run with settings that would make it another one.

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


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Give settings that did not exist when a checkpoint was written their defaults.

    Raises:
        ValueError: If it has settings that do not exist any more.
    """
    plain: dict[str, Any] = to_plain(from_plain(TrainConfig, stored))
    return plain


def _differences(a: Any, b: Any, name: str) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for key in sorted({*a, *b})
            for found in _differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if a == b else [(name, a, b)]


def optimizer_targets(
    optimizers: Optimizers, stored: Mapping[str, TensorInfo]
) -> dict[str, Tensor]:
    """Make the tensors that a stored optimizer state is read into.

    Args:
        optimizers: Of the run that goes on; before its first step it has no state of its own.
        stored: Names (``<parameter name>/<state name>``) and shapes in the checkpoint.

    Returns:
        Zeros by the same names; what has its parameter's shape is on its device and sharded as it
        is. Names that belong to no parameter are for `Optimizers.load_tensors` to refuse.
    """
    targets = {}
    for name, info in stored.items():
        parameter = optimizers.parameters.get(name.rpartition("/")[0])
        if parameter is not None and parameter.shape == info.shape:
            targets[name] = torch.zeros_like(parameter, dtype=info.dtype, requires_grad=False)
        else:
            targets[name] = torch.zeros(info.shape, dtype=info.dtype)
    return targets


def random_state(device: torch.device) -> dict[str, str]:
    """Return torch's random state of the CPU and of a CUDA device, JSON-ready."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_random_state(stored: Mapping[str, str], device: torch.device) -> None:
    """Restore what `random_state` returned; a CUDA device it knows nothing of keeps its state."""
    states = {
        name: torch.frombuffer(bytearray(b64decode(text)), dtype=torch.uint8)
        for name, text in stored.items()
    }
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def continue_random(
    stored: Sequence[Mapping[str, str]], world: World, seed: int, step: int
) -> None:
    """Give each rank its own random state again, or where their number changed a new one.

    Args:
        stored: States of the ranks that stored the checkpoint.
        world: The ranks that go on.
        seed: The run's seed.
        step: Steps done.
    """
    if len(stored) == world.size:
        set_random_state(stored[world.rank], world.device)
    else:
        seed_rank(world, seed, step)


def seed_rank(world: World, seed: int, step: int) -> None:
    """Seed torch by (seed, step, rank), so that no two ranks drop the same paths."""
    torch.manual_seed(crc32(f"{seed} {step} {world.rank}".encode()))
