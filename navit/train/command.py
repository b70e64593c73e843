"""`navit train`: from settings to a finished run, on one process or on the ranks of torchrun."""

import errno
import json
import sys
from datetime import timedelta

from navit.serialize import to_plain
from navit.train.checkpoint import CheckpointError
from navit.train.config import TrainConfig
from navit.train.loop import NonFiniteLoss, Trainer
from navit.train.ranks import World, join_world
from navit.train.setup import resolve_device, resolve_run
from navit.train.stops import RankFailed, from_main, naming_lost_ranks
from navit.train.summary import draw_results, format_run

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def run_train(config: TrainConfig, name: str) -> int:
    """Train, and print what came of it; return the exit status.

    Args:
        config: The run's settings.
        name: Name of the preset, which numbers the run folder where none is given.

    Returns:
        0; 1 where the run could not go on: a rank lost, no room for a checkpoint, too many bad
        losses in a row.
    """
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    try:
        with join_world(resolve_device(config), timeout=timeout) as world, naming_lost_ranks(world):
            _train(config, name, world)
    except (CheckpointError, NonFiniteLoss, RankFailed) as error:
        print(f"navit train: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        print(
            f"navit train: there must be room to write the run's files; found {error}. Make room, "
            "then go on with --resume: the checkpoints are whole.",
            file=sys.stderr,
        )
        return 1
    return 0


def _train(config: TrainConfig, name: str, world: World) -> None:
    """Train on these ranks; rank 0 prints and draws."""
    run = from_main(world, lambda: resolve_run(config, name))
    trainer = Trainer(config, run, world)
    if world.is_main:
        print(f"{run}: {trainer.describe()}", file=sys.stderr)
    result = trainer.train()
    if not world.is_main:
        return
    if result.evaluation is not None:
        summary = {"step": result.step, "metrics": result.evaluation.metrics}
        summary |= {"padding": result.stats.padding, "stats": to_plain(result.stats)}
        summary |= {"tokens_per_second": result.tokens_per_second}
        (run / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(format_run(result))
    pictures = draw_results(result, trainer.val_shards)
    print("pictures:   " + "\n            ".join(map(str, pictures)))
    if result.step < trainer.config.steps:
        print(f"stopped early; go on with: navit train {name} --run {run} --resume ...")
