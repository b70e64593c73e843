"""The training loop: packed batches in, a trained model and its run folder out."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from navit.evaluate.run import Evaluation
from navit.serialize import to_plain
from navit.train.checkpoint import (
    Checkpoint,
    check_same_run,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from navit.train.config import TrainConfig
from navit.train.ema import Ema
from navit.train.metrics import MetricsLog, Throughput
from navit.train.optim import build_optimizers, learning_rate_factor
from navit.train.setup import resolve_autocast, resolve_device, resolve_shards
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
    """Optimizer steps done; fewer than asked for after SIGTERM."""
    checkpoint: Path
    """The last checkpoint."""
    evaluation: Evaluation | None
    """The final evaluation; None without validation shards or after SIGTERM."""
    stats: BatchStats
    """Counts of images, tokens and skipped samples over the whole run."""
    tokens_per_second: float
    """Kept tokens per second over this process's steps, evaluation left out."""
    images_per_second: float
    """Images per second over the same steps."""


class NonFiniteLoss(RuntimeError):
    """The loss was NaN or infinite too many steps in a row."""


class Trainer:
    """One run: everything that has state, and the loop over it."""

    def __init__(self, config: TrainConfig, run: Path) -> None:
        self.run = run
        self.train_shards, self.val_shards = resolve_shards(config)
        self.device = resolve_device(config)
        self.autocast_dtype = resolve_autocast(config, self.device)
        self.task = make_task(config, run, self.train_shards)
        self.config = config = self.task.config
        self.model = self.task.model.to(self.device)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.ema = Ema(self.model, config.ema_decay) if config.ema_decay else None
        stored = None
        self.stats = BatchStats()
        self.step = 0
        self.bad_losses_in_row = 0
        self.bad_losses = 0
        self.last_loss = float("nan")
        self.saved: tuple[int, Path] | None = None
        self.evaluated_at = -1
        if config.resume and has_checkpoint(run):
            stored = self._restore(find_checkpoint(run))
        self.data = self.task.make_data(self.train_shards, self.device, stored)

    def describe(self) -> str:
        """Say in one line what is trained, on what and where."""
        precision = "float32" if self.autocast_dtype is None else "bf16 autocast"
        return (
            f"{self.task.source}, {sum(p.numel() for p in self.model.parameters()):,} "
            f"parameters, {self.device}, {precision}, steps {self.step} to {self.config.steps}"
        )

    def train(self, *, progress: bool = True) -> TrainResult:
        """Run all remaining steps, then evaluate; SIGTERM checkpoints and returns early."""
        config = self.config
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "config.json").write_text(json.dumps(to_plain(config), indent=2) + "\n")
        evaluation: Evaluation | None = None
        timed = Throughput()
        seconds = 0.0
        with (
            MetricsLog(self.run, start_step=self.step) as log,
            _stop_requested() as stopping,
            tqdm(
                total=config.steps,
                initial=self.step,
                unit="step",
                disable=not progress,
                mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file needs few lines
            ) as self.bar,
        ):
            batches = iter(self.data)
            first = self.stats
            while self.step < config.steps and not stopping():
                start = perf_counter()
                batch = next(batches)
                waited = perf_counter() - start
                if not (self.run / "packing.png").exists():
                    draw_batch(batch, self.run / "packing.png")
                self._step(batch, log)
                took = perf_counter() - start
                timed.add(batch.stats, waited=waited, seconds=took)
                seconds += took
                if self.step % LOG_EVERY == 0 or self.step == config.steps:
                    rates = timed.read()
                    log.write("rates", self.step, rates)
                    self._show(rates)
                # Before the evaluation, which a bad validation shard may end.
                if self.step % config.checkpoint_every == 0:
                    self.save()
                if config.eval_every and self.step % config.eval_every == 0:
                    evaluation = self.evaluate(log)
            checkpoint = self.save()
            finished = self.step >= config.steps
            if finished and self.evaluated_at != self.step:
                evaluation = self.evaluate(log)
        return TrainResult(
            run=self.run,
            step=self.step,
            checkpoint=checkpoint,
            evaluation=evaluation if finished else None,
            stats=self.stats,
            tokens_per_second=(self.stats.tokens - first.tokens) / max(seconds, 1e-9),
            images_per_second=(self.stats.images - first.images) / max(seconds, 1e-9),
        )

    def evaluate(self, log: MetricsLog) -> Evaluation | None:
        """Evaluate the averaged weights on the validation shards, if there are any."""
        if not self.val_shards:
            return None
        with self.ema.swap(self.model) if self.ema else nullcontext():
            found = self.task.evaluate(self.val_shards, self.device, self.autocast_dtype)
        log.write("eval", self.step, found.metrics)
        self.evaluated_at = self.step
        return found

    def save(self) -> Path:
        """Write a checkpoint of everything a resumed run needs, unless this step has one."""
        if self.saved is not None and self.saved[0] == self.step:
            return self.saved[1]
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizers.tensors()}
        if self.ema is not None:
            tensors["ema"] = self.ema.tensors()
        state = {
            "step": self.step,
            "config": to_plain(self.config),
            "loader": self.data.to_dict(),
            "stats": asdict(self.stats),
            "bad_losses": [self.bad_losses, self.bad_losses_in_row],
            "rng": rng_state(),
            "tokenizer": self.task.tokenizer.hash if self.task.tokenizer else None,
        }
        path = save_checkpoint(
            self.run / "checkpoints",
            self.step,
            Checkpoint(tensors, state, self.task.files()),
            keep=self.config.keep_checkpoints,
        )
        self.saved = (self.step, path)
        return path

    def _restore(self, path: Path) -> Any:
        """Read a checkpoint; return the stored position in the data."""
        checkpoint = load_checkpoint(path)
        state = checkpoint.state
        check_same_run(state["config"], to_plain(self.config), path)
        tokenizer = self.task.tokenizer
        if tokenizer is not None and state["tokenizer"] != tokenizer.hash:
            raise ValueError(
                f"{path} was trained with another tokenizer (hash {state['tokenizer']}); got "
                f"{tokenizer.hash}. Restore tokenizer.json of the run folder."
            )
        self.model.load_state_dict(checkpoint.tensors["model"])
        self.optimizers.load_tensors(checkpoint.tensors["optimizer"])
        if self.ema is not None:
            self.ema.load_tensors(checkpoint.tensors["ema"])
        self.stats = BatchStats(**state["stats"])
        self.step = state["step"]
        self.bad_losses, self.bad_losses_in_row = state["bad_losses"]
        set_rng_state(state["rng"])
        self.saved = (self.step, path)
        return state["loader"]

    def _step(self, batch: PackedBatch, log: MetricsLog) -> None:
        """Take one optimizer step; a batch without images or with a bad loss takes none."""
        factor = learning_rate_factor(self.step, self.config.optim, self.config.steps)
        self.data.update(batch)
        self.stats = self.stats + batch.stats
        self.step += 1
        self.bar.update()
        if not batch.num_images:
            return
        loss = self._loss(batch)
        value = loss.item()
        if not isfinite(value):
            self._count_bad_loss(value, batch, log)
            return
        self.optimizers.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers.set_lr(factor)
        norm = self.optimizers.step()
        if not isfinite(norm):  # the optimizers left everything as it was
            self._count_bad_loss(norm, batch, log)
            return
        self.bad_losses_in_row = 0
        self.task.after_step()
        if self.ema is not None:
            self.ema.update(self.model)
        self.last_loss = value
        log.write(
            "train",
            self.step,
            {
                "loss": value,
                "lr": factor * self.config.optim.learning_rate,
                "gradient_norm": float(norm),
                "images": batch.num_images,
                **self.task.readings(),
            },
        )

    def _loss(self, batch: PackedBatch) -> torch.Tensor:
        batch = batch.to(self.device, non_blocking=True)
        with torch.autocast(
            self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        ):
            return self.task.loss(batch)

    def _count_bad_loss(self, value: float, batch: PackedBatch, log: MetricsLog) -> None:
        self.bad_losses += 1
        self.bad_losses_in_row += 1
        log.write("bad_loss", self.step, {"loss": str(value), "keys": list(batch.keys)})
        if self.bad_losses_in_row >= self.config.max_bad_losses:
            raise NonFiniteLoss(
                f"loss and gradient norm must be finite; one was {value} in the last of "
                f"{self.bad_losses_in_row} bad steps in a row. The keys of these batches are in "
                f"{log.path}. Lower the learning rate, or look at those samples."
            )

    def _show(self, rates: dict[str, float]) -> None:
        self.bar.set_postfix_str(
            f"loss {self.last_loss:.3f}, {rates['images_per_second']:.0f} images/s, "
            f"{rates['tokens_per_second']:.0f} kept tokens/s, padding {rates['padding']:.3%}, "
            f"waiting {rates['data_wait']:.0%}",
            refresh=False,
        )


@contextmanager
def _stop_requested() -> Iterator[Any]:
    """Turn SIGTERM into a request that the loop reads between steps."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
