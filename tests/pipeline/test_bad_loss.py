"""A loss that is not finite: the step is left out and counted, and too many of them end the run."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from navit.train.config import TrainConfig
from navit.train.loop import NonFiniteLoss, Trainer
from navit.train.metrics import read_metrics
from packer.batch import PackedBatch
from packer.config import PackerConfig
from tests.helpers.samples import image_samples, make_shards


def make_trainer(folder: Path, **options: Any) -> Trainer:
    shape = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}
    model = CLIPConfig(
        vision=NaViTConfig.from_dict({**shape, "pool": "mean"}),
        text=TextConfig.from_dict({**shape, "pool": "mean"}),
        embed_dim=16,
    )
    config = TrainConfig(
        shards=tuple(make_shards(folder / "shards", image_samples(24), 24)),
        packer=PackerConfig(patch_size=8, seq_len=32),
        model=model,
        **{
            "steps": 6,
            "sequences_per_batch": 2,
            "workers": 0,
            "shuffle_window": 1,
            "vocab_size": 300,
            "precision": "fp32",
            "device": "cpu",
        }
        | options,
    )
    run = folder / "run"
    run.mkdir()
    return Trainer(config, run)


def spoil(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, factors: dict[int, float]
) -> dict[int, list[str]]:
    """Multiply the loss of some steps; return the keys of all steps' batches, as they come."""
    seen: dict[int, list[str]] = {}
    loss = trainer.task.loss

    def spoiled(output: Any, batches: Sequence[PackedBatch], group: Any) -> torch.Tensor:
        step = trainer.state.step
        seen[step] = [key for batch in batches for key in batch.keys]
        return loss(output, batches, group) * factors.get(step, 1.0)

    monkeypatch.setattr(trainer.task, "loss", spoiled)
    return seen


def test_a_nan_or_inf_loss_is_a_step_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    keys = spoil(monkeypatch, trainer, {2: float("nan"), 3: float("inf"), 5: float("-inf")})
    weights = [torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()])]
    step = Trainer._step

    def watched(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        weights.append(torch.cat([p.detach().flatten() for p in self.state.model.parameters()]))

    monkeypatch.setattr(Trainer, "_step", watched)
    trainer.train(progress=False)

    unchanged = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert unchanged == [False, True, True, False, True, False]
    assert bool(weights[-1].isfinite().all())
    assert trainer.state.bad_losses == 3
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    bad = [line for line in lines if line["event"] == "bad_loss"]
    assert [(line["step"], line["loss"]) for line in bad] == [(2, "nan"), (3, "inf"), (5, "-inf")]
    assert [line["keys"] for line in bad] == [keys[i] for i in (2, 3, 5)]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 4, 6]


def test_k_bad_losses_in_a_row_end_the_run_with_the_keys_of_the_batches_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_bad_losses=2)
    nan = float("nan")
    keys = spoil(monkeypatch, trainer, {1: nan, 3: nan, 4: nan})
    with pytest.raises(NonFiniteLoss, match=r"one was nan in the last of 2 bad .*metrics\.jsonl"):
        trainer.train(progress=False)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    bad = {line["step"]: line["keys"] for line in lines if line["event"] == "bad_loss"}
    assert bad == {i: keys[i] for i in (1, 3, 4)}
    assert all(key.startswith("s-00000.tar/") for keys in bad.values() for key in keys)
