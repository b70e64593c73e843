"""The training loop: packed batches in, a trained model and its run folder out."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from time import monotonic, perf_counter

import torch
from tqdm import tqdm

from navit.evaluate.run import Evaluation
from navit.serialize import to_plain
from navit.train.config import TrainConfig
from navit.train.flops import STEP_OVER_FORWARD, batch_flops, matmul_rate
from navit.train.metrics import MetricsLog, Throughput
from navit.train.optim import learning_rate_factor
from navit.train.parallel import whole_model
from navit.train.ranks import World, alone
from navit.train.setup import resolve_autocast, resolve_device, resolve_shards
from navit.train.state import TrainState
from navit.train.step import StepLoss, gradients
from navit.train.stops import RankFailed, StopRequest, from_main
from navit.train.tasks import make_task
from packer.batch import BatchStats, PackedBatch
from packer.report import draw_batch

LOG_EVERY = 10
"""Steps between readings of the rates; the loss of every step is written."""


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    run: Path
    """The run folder."""
    step: int
    """Optimizer steps done; fewer than asked for after SIGTERM or the time limit."""
    checkpoint: Path
    """The last checkpoint."""
    evaluation: Evaluation | None
    """The final evaluation, on rank 0; None without validation shards or where the run stopped."""
    stats: BatchStats
    """Counts of images, tokens and skipped samples over the whole run and all ranks."""
    tokens_per_second: float
    """Kept tokens per second over this process's steps, evaluation left out; of all ranks."""
    images_per_second: float
    """Images per second over the same steps."""


class NonFiniteLoss(RuntimeError):
    """The loss was NaN or infinite too many steps in a row."""


class Trainer:
    """One run: everything that has state, and the loop over it.

    On several ranks each makes its own, at the same time; most methods are collectives.

    Args:
        config: The run's settings.
        run: The run folder, on a file system that all ranks see.
        world: The ranks, as `join_world` gives them; None is a process alone.
    """

    def __init__(self, config: TrainConfig, run: Path, world: World | None = None) -> None:
        self._start = monotonic()
        self.run = run
        self.world = world = alone(resolve_device(config)) if world is None else world
        self.train_shards, self.val_shards = from_main(world, lambda: resolve_shards(config))
        self.autocast_dtype = resolve_autocast(config, world.device)
        self.task = make_task(config, run, self.train_shards, world)
        self.config = self.task.config
        self.state = TrainState(self.task, self.train_shards, run, world)
        self.last_loss = float("nan")
        self.evaluation: Evaluation | None = None
        self.evaluated_at = -1

    def describe(self) -> str:
        """Say in one line what is trained, on what and where."""
        precision = "float32" if self.autocast_dtype is None else "bf16 autocast"
        ranks = f" x {self.world.size} ranks" if self.world.size > 1 else ""
        return (
            f"{self.task.source}, {sum(p.numel() for p in self.state.model.parameters()):,} "
            f"parameters, {self.world.device.type}{ranks}, {precision}, steps {self.state.step} to "
            f"{self.config.steps}"
        )

    def train(self, *, progress: bool = True) -> TrainResult:
        """Run all remaining steps, then evaluate.

        SIGTERM on any rank, or the time limit, makes a checkpoint and returns early.
        """
        config, is_main = self.config, self.world.is_main
        if is_main:
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / "config.json").write_text(json.dumps(to_plain(config), indent=2) + "\n")
        with (
            MetricsLog(self.run, start_step=self.state.step, enabled=is_main) as log,
            StopRequest(config.time_limit, self._start) as self.stop,
            tqdm(
                total=config.steps,
                initial=self.state.step,
                unit="step",
                disable=not progress or not is_main,
                mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file needs few lines
            ) as self.bar,
        ):
            seconds = self._run_steps(log)
            checkpoint = self.state.save()
            finished = self.state.step >= config.steps
            if finished and self.evaluated_at != self.state.step:
                self.evaluate(log)
        stats, before = self.state.stats_of_all(), self.state.stored_stats
        seen = max(seconds, 1e-9)
        return TrainResult(
            run=self.run,
            step=self.state.step,
            checkpoint=checkpoint,
            evaluation=self.evaluation if finished else None,
            stats=stats,
            tokens_per_second=(stats.tokens - before.tokens) / seen,
            images_per_second=(stats.images - before.images) / seen,
        )

    def _run_steps(self, log: MetricsLog) -> float:
        """Run steps up to the last one or a request to stop; return the seconds they took."""
        config, shape = self.config, self.state.model.config
        dtype = self.autocast_dtype or torch.float32
        timed = Throughput(self.world, matmul_rate(self.world.device, dtype))
        seconds = 0.0
        batches = iter(self.state.data)
        while self.state.step < config.steps:
            start = perf_counter()
            taken = self._take(batches)
            if taken is None:
                break
            waited = perf_counter() - start
            picture = self.run / "packing.png"
            if self.world.is_main and not picture.exists():
                draw_batch(taken[0], picture)
            self._step(taken, log)
            took = perf_counter() - start
            timed.add(
                sum((batch.stats for batch in taken), BatchStats()),
                waited=waited,
                seconds=took,
                flops=STEP_OVER_FORWARD * sum(batch_flops(shape, batch) for batch in taken),
            )
            seconds += took
            if self.state.step % LOG_EVERY == 0 or self.state.step == config.steps:
                rates = timed.read()
                log.write("rates", self.state.step, rates)
                self._show(rates)
            # Before the evaluation, which a bad validation shard may end.
            if self.state.step % config.checkpoint_every == 0:
                self.state.save()
            if config.eval_every and self.state.step % config.eval_every == 0:
                self.evaluate(log)
        return seconds

    def _take(self, batches: Iterator[PackedBatch]) -> list[PackedBatch] | None:
        """Return this rank's batches of the next step; None where any rank is to stop.

        All ranks agree here, once a step: one that stopped by itself, or could not read, would
        leave the others waiting in the collectives of the step.
        """
        found: list[PackedBatch] = []
        error: Exception | None = None
        if not self.stop.is_set:
            try:
                found = [next(batches) for _ in range(self.config.parallel.accumulate)]
            except Exception as caught:
                error = caught
        failed, stopping = self.world.sum([error is not None, self.stop.is_set])
        if error is not None:
            raise error
        if failed:
            raise RankFailed(
                "another rank could not read its next batch, so no rank can go on; its own message "
                "says why."
            )
        return None if stopping else found

    def evaluate(self, log: MetricsLog) -> None:
        """Evaluate the averaged weights on the validation shards, if there are any.

        Rank 0 does, on weights that are whole there; the others wait.
        """
        if not self.val_shards:
            return
        with self.state.ema.swap(self.state.model) if self.state.ema else nullcontext():
            model = whole_model(self.state.model)
            from_main(self.world, lambda: self._evaluate(model, log))
        self.evaluated_at = self.state.step

    def _evaluate(self, model: torch.nn.Module, log: MetricsLog) -> None:
        device, dtype = self.world.device, self.autocast_dtype
        self.evaluation = self.task.evaluate(model, self.val_shards, device, dtype)
        log.write("eval", self.state.step, self.evaluation.metrics)

    def _step(self, batches: Sequence[PackedBatch], log: MetricsLog) -> None:
        """Take one optimizer step; without images, or with a bad loss, none."""
        state = self.state
        factor = learning_rate_factor(state.step, self.config.optim, self.config.steps)
        for batch in batches:
            state.take(batch)
        state.step += 1
        self.bar.update()
        state.optimizers.zero_grad()
        found = self._gradients(batches)
        if not found.images:
            return
        if not isfinite(found.loss):
            self._count_bad_loss(found.loss, batches, log)
            return
        state.optimizers.set_lr(factor)
        norm = state.optimizers.step()
        if not isfinite(norm):  # the optimizers left everything as it was
            self._count_bad_loss(norm, batches, log)
            return
        state.bad_losses_in_row = 0
        self.task.after_step()
        if state.ema is not None:
            state.ema.update(state.model)
        self.last_loss = found.loss
        log.write(
            "train",
            state.step,
            {
                "loss": found.loss,
                "lr": factor * self.config.optim.learning_rate,
                "gradient_norm": float(norm),
                "images": found.images,
                **self.task.readings(),
            },
        )

    def _gradients(self, batches: Sequence[PackedBatch]) -> StepLoss:
        return gradients(
            self.task,
            self.state.wrapped,
            batches,
            self.world,
            autocast_dtype=self.autocast_dtype,
            cache=self.config.parallel.gradient_cache,
        )

    def _count_bad_loss(
        self, value: float, batches: Sequence[PackedBatch], log: MetricsLog
    ) -> None:
        """Note a step that was left out; loss and norm are the same on all ranks, so all do."""
        state = self.state
        state.bad_losses += 1
        state.bad_losses_in_row += 1
        mine = [key for batch in batches for key in batch.keys]
        keys = [key for of_rank in self.world.gather(mine) for key in of_rank]
        log.write("bad_loss", state.step, {"loss": str(value), "keys": keys})
        if state.bad_losses_in_row >= self.config.max_bad_losses:
            raise NonFiniteLoss(
                f"loss and gradient norm must be finite; one was {value} in the last of "
                f"{state.bad_losses_in_row} bad steps in a row. The keys of these batches are in "
                f"{log.path}. Lower the learning rate, or look at those samples."
            )

    def _show(self, rates: dict[str, float]) -> None:
        self.bar.set_postfix_str(
            f"loss {self.last_loss:.3f}, {rates['images_per_second']:.0f} images/s, "
            f"{rates['tokens_per_second']:.0f} kept tokens/s, padding {rates['padding']:.3%}, "
            f"waiting {rates['data_wait']:.0%}",
            refresh=False,
        )
