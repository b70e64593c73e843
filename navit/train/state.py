"""Everything of a run that a checkpoint stores, from which it goes on as if never stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from navit.serialize import to_plain
from navit.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    has_checkpoint,
    load_tensors,
    read_state,
    save_checkpoint,
    stored_tensors,
)
from navit.train.ema import Ema
from navit.train.optim import build_optimizers
from navit.train.parallel import parallelize
from navit.train.ranks import World
from navit.train.resume import (
    check_same_run,
    continue_random,
    optimizer_targets,
    random_state,
    seed_rank,
    with_defaults,
)
from navit.train.stops import from_main
from navit.train.tasks import Task
from navit.train.teacher import TEACHER_FILE
from packer.batch import BatchStats, PackedBatch


class TrainState:
    """Weights, optimizers, average, position in the data, random numbers and counts of one rank.

    Every rank makes its own, at the same time. Between steps it is what the same run would be
    without stops: bit for bit on the CPU, on as many ranks as before.

    Args:
        task: The model and its data.
        shards: Training shards, or the one folder.
        run: The run folder, whose newest checkpoint is read where the run is to be resumed.
        world: The ranks.

    Raises:
        ValueError: If the checkpoint is of a run with other settings, data or tokenizer.
    """

    def __init__(self, task: Task, shards: Sequence[str], run: Path, world: World) -> None:
        config = task.config
        self.task, self.run, self.world, self.config = task, run, world, config
        self.model = task.model.to(world.device)
        if config.compile:
            self.model.compile()
        self.wrapped = parallelize(self.model, world, config.parallel)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.ema = Ema(self.model, config.ema_decay) if config.ema_decay else None
        if world.rank:  # rank 0 goes on from the weights' seed, as a process alone does
            seed_rank(world, config.seed, 0)
        self.step = 0
        self.bad_losses, self.bad_losses_in_row = 0, 0
        self.stats = BatchStats()
        """Counts of this rank since it started."""
        self.stored_stats = BatchStats()
        """Counts of all ranks before."""
        self._saved: tuple[int, Path] | None = None
        position = None
        if config.resume:
            path = from_main(world, lambda: find_checkpoint(run) if has_checkpoint(run) else None)
            position = None if path is None else self._restore(path)
        self.data = task.make_data(shards, position)

    def take(self, batch: PackedBatch) -> None:
        """Note that a batch is trained on in this step."""
        self.data.update(batch)
        self.stats = self.stats + batch.stats

    def stats_of_all(self) -> BatchStats:
        """Return the counts of the whole run and of all ranks; a collective."""
        return sum(self.world.gather(self.stats), self.stored_stats)

    def save(self) -> Path:
        """Write a checkpoint, unless this step has one; a collective.

        Raises:
            CheckpointError: If it could not be written.
        """
        if self._saved is not None and self._saved[0] == self.step:
            return self._saved[1]
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizers.tensors()}
        if self.ema is not None:
            tensors["ema"] = self.ema.tensors()
        of_ranks = self.world.gather((self.data.to_dict(), random_state(self.world.device)))
        state = {
            "step": self.step,
            "config": to_plain(self.config),
            "loader": self.data.merged([position for position, _ in of_ranks]),
            "rng": [random for _, random in of_ranks],
            "stats": asdict(self.stats_of_all()),
            "bad_losses": [self.bad_losses, self.bad_losses_in_row],
            "tokenizer": self.task.tokenizer.hash if self.task.tokenizer else None,
        }
        path = save_checkpoint(
            self.run / "checkpoints",
            self.step,
            Checkpoint(tensors, state, self.task.files()),
            keep=self.config.keep_checkpoints,
            world=self.world,
        )
        self._saved = (self.step, path)
        return path

    def _restore(self, path: Path) -> Mapping[str, Any]:
        """Read a checkpoint; return the stored position in the data."""
        state = read_state(path)
        check_same_run(with_defaults(state["config"]), to_plain(self.config), path)
        tokenizer = self.task.tokenizer
        if tokenizer is not None and state["tokenizer"] != tokenizer.hash:
            raise ValueError(
                f"{path} was trained with another tokenizer (hash {state['tokenizer']}); got "
                f"{tokenizer.hash}. Restore tokenizer.json of the run folder."
            )
        stored = path / TEACHER_FILE
        digest = stored.read_text() if stored.exists() else None
        if digest != self.task.files().get(TEACHER_FILE):
            raise ValueError(
                f"a run continues with its own teacher, and {path} has another teacher than "
                f"{self.config.teacher}: the weights differ, or one of the two has none. Set "
                "--teacher as in the run's config.json."
            )
        optimizer = optimizer_targets(self.optimizers, stored_tensors(path).get("optimizer", {}))
        groups = {"model": self.model.state_dict(), "optimizer": optimizer}
        if self.ema is not None:
            groups["ema"] = self.ema.tensors()
        load_tensors(path, groups, world=self.world)
        self.optimizers.load_tensors(optimizer)
        if self.ema is not None:
            self.ema.load_tensors(groups["ema"])
        self.stored_stats = BatchStats(**state["stats"])
        self.step = state["step"]
        self.bad_losses, self.bad_losses_in_row = state["bad_losses"]
        continue_random(state["rng"], self.world, self.config.seed, self.step)
        self._saved = (self.step, path)
        position: Mapping[str, Any] = state["loader"]
        return position
