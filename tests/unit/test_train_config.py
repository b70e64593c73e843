from pathlib import Path

import pytest

from navit.train.checkpoint import Checkpoint, save_checkpoint
from navit.train.config import TrainConfig
from navit.train.parallel import ParallelConfig
from navit.train.setup import resolve_run, resolve_shards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"workers": -1}, "workers must not be negative; got -1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\); got 1.0"),
        ({"precision": "fp8"}, "precision must be 'auto', 'bf16' or 'fp32'; got 'fp8'"),
        ({"contrastive_loss": "hinge"}, "must be 'softmax' or 'sigmoid'; got 'hinge'"),
        ({"time_limit": 0.0}, "time_limit must be positive, or None; got 0.0"),
        ({"num_streams": 0}, "num_streams must be at least 1, or None; got 0"),
        ({"loss_chunk": 0}, "loss_chunk must be at least 1, or None; got 0"),
        ({"val": ("v.tar",)}, "val needs shards"),
        ({"task": "segment"}, "'contrastive', 'classify' or 'masked'; got 'segment'"),
        ({"task": "masked", "teacher": Path("t")}, "takes no teacher and freezes nothing"),
        ({"task": "masked", "freeze": ("vision",)}, "takes no teacher and freezes nothing"),
        (
            {"compile": True, "parallel": ParallelConfig("fsdp2")},
            "compile needs parallel.strategy 'ddp' or 'auto'",
        ),
    ],
)
def test_a_wrong_setting_says_what_must_hold(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)  # type: ignore[arg-type]


def test_runs_are_numbered_and_the_newest_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert resolve_run(TrainConfig(), "demo") == Path("runs/demo-001")
    for number in ("001", "999", "1000", "1001"):
        Path(f"runs/demo-{number}").mkdir(parents=True)
    for number in ("999", "1000"):
        save_checkpoint(Path(f"runs/demo-{number}/checkpoints"), 1, Checkpoint({}, {}))
    assert resolve_run(TrainConfig(), "demo") == Path("runs/demo-1002")
    assert resolve_run(TrainConfig(resume=True), "demo") == Path("runs/demo-1000")
    with pytest.raises(FileNotFoundError, match="there is no pairs run below runs/ with a check"):
        resolve_run(TrainConfig(resume=True), "pairs")
    with pytest.raises(FileNotFoundError, match="there is no run in typo to resume"):
        resolve_run(TrainConfig(resume=True, run=Path("typo")), "demo")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()

    with pytest.raises(ValueError, match=r"already holds a run\. Continue it with --resume"):
        resolve_run(TrainConfig(run=tmp_path), "demo")
    assert resolve_run(TrainConfig(run=tmp_path, resume=True), "demo") == tmp_path


def test_a_shard_that_does_not_exist_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must exist"):
        resolve_shards(TrainConfig(shards=(str(tmp_path / "none-{0..1}.tar"),)))
