"""Tar to loss, stop and resume, evaluate: the commands a user types, on a tiny set and model."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from navit.train.metrics import read_metrics
from packer.demo import DemoPaths, ensure_demo

TINY = (
    *("--packer.patch-size", "16", "--packer.seq-len", "64", "--packer.max-tokens", "32"),
    *("--sequences-per-batch", "4", "--shuffle-window", "16", "--optim.warmup-steps", "2"),
    *("--optim.cooldown-steps", "4", "--model.vision.width", "32", "--model.vision.depth", "1"),
    *("--model.vision.num-heads", "2", "--model.vision.mlp-dim", "64", "--model.text.width", "32"),
    *("--model.text.depth", "1", "--model.text.num-heads", "2", "--model.text.mlp-dim", "64"),
    *("--model.embed-dim", "32", "--vocab-size", "300"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return ensure_demo(tmp_path_factory.mktemp("demo"), num_train=96, num_val=24, progress=False)


def command(paths: DemoPaths, run: Path, *options: str) -> list[str]:
    shards = ["--shards", *map(str, paths.train), "--val", *map(str, paths.val)]
    return [
        *(sys.executable, "-m", "navit", "train", "pairs", *shards, "--run", str(run)),
        *TINY,
        *options,
    ]


def navit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "navit", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def losses(run: Path) -> list[tuple[int, float]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        done = losses(run)
        if done and done[-1][0] >= step:
            return
        assert process.poll() is None, "training ended before it was to be stopped"
        time.sleep(0.02)
    raise AssertionError("training did not reach the step in time")


@pytest.fixture(scope="module")
def undisturbed(tiny: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    options = ("--steps", "30", "--checkpoint-every", "7", "--workers", "2")
    done = subprocess.run(
        command(tiny, run, *options), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (run / "stdout.txt").write_text(done.stdout)
    return run


def test_a_run_leaves_everything_it_promises(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    printed = (undisturbed / "stdout.txt").read_text()

    assert {"loss.png", "packing.png", "retrieval.png", "metrics.jsonl", "tensorboard"} <= names
    assert {"result.json", "tokenizer.json", "config.json", "checkpoints"} <= names
    for said in ("text to image", "padding", "kept tokens/s", "retrieval.png", "images kept"):
        assert said in printed
    result = json.loads((undisturbed / "result.json").read_text())
    assert result["step"] == 30
    assert 0 <= result["metrics"]["text_to_image/recall@10"] <= 1
    assert result["padding"] < 0.05
    assert len(losses(undisturbed)) == 30
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert {"train", "rates", "eval"} == {line["event"] for line in lines}
    for line in lines:
        if line["event"] == "train":
            assert 0 < line["gradient_norm"] < 1e4
            assert line["images"] > 0
        elif line["event"] == "rates":
            assert all(math.isfinite(value) for value in line.values() if value != "rates")
            assert line["tokens_per_second"] > line["images_per_second"] > 0
            assert 0 <= line["padding"] < 0.05
            assert 0 <= line["drop_rate"] < 1
            assert 0 <= line["data_wait"] < 1
            assert 0 < line["mfu"] < 1
            assert line["rss_mib"] > 100


# test_kills.py has SIGKILL among the fast tests.
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_stopped_and_resumed_run_has_the_losses_of_one_never_stopped(
    tiny: DemoPaths, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "stopped"
    options = ("--steps", "30", "--checkpoint-every", "7", "--workers", "2")
    # A session of its own, so that the kill takes the loader's workers with it.
    process = subprocess.Popen(
        command(tiny, run, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_step(process, run, 10)
    os.killpg(process.pid, number)
    process.wait(timeout=60)
    before = losses(run)[-1][0]
    assert before < 30, "the run ended before the signal"

    resumed = subprocess.run(
        command(tiny, run, *options, "--resume"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert resumed.returncode == 0, resumed.stderr
    assert losses(run) == losses(undisturbed)
    if number == signal.SIGTERM:
        assert process.returncode == 0
        assert f"steps {before} to 30" in resumed.stderr


def test_a_checkpoint_is_evaluated_to_what_its_run_ended_with(
    tiny: DemoPaths, undisturbed: Path, tmp_path: Path
) -> None:
    found = tmp_path / "metrics.json"

    done = navit("evaluate", undisturbed, "--shards", *tiny.val, "--json", found)

    assert done.returncode == 0, done.stderr
    assert "image to text" in done.stdout
    expected = json.loads((undisturbed / "result.json").read_text())["metrics"]
    assert json.loads(found.read_text())["results"][0]["metrics"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--shards", "none.tar"), "every shard must exist"),
        (("train", "--packer.max-tokens", "9999"), "max_tokens must be at most seq_len"),
        (("evaluate", "nowhere", "--shards", "none.tar"), "no checkpoint found in nowhere"),
        (("fly",), "usage: navit COMMAND"),
    ],
)
def test_a_wrong_command_ends_with_a_message_and_no_traceback(
    arguments: tuple[str, ...], message: str
) -> None:
    done = navit(*arguments)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_losses_are_those_of_the_cpu_and_a_run_in_two_parts_has_those_of_one(
    tiny: DemoPaths, tmp_path: Path, device: str
) -> None:
    """In float32. On a GPU kernels add in any order: the numbers are a little apart."""
    options = ["--precision", "fp32", "--workers", "1", "--optim.cooldown-steps", "0"]

    def train(name: str, device: str, steps: int, *more: str) -> list[tuple[int, float]]:
        line = command(tiny, tmp_path / name, "--device", device, "--steps", str(steps), *more)
        place = line.index("--optim.cooldown-steps")  # its place is taken by ours
        done = navit(*line[3:place], *line[place + 2 :], *options)
        assert done.returncode == 0, done.stderr
        assert f", {device}, float32" in done.stderr
        return losses(tmp_path / name)

    reference, whole = train("cpu", "cpu", 12), train("whole", device, 12)
    assert [step for step, _ in train("parts", device, 6)] == list(range(1, 7))
    parts = train("parts", device, 12, "--resume")

    for (step, here), (_, there), (number, again) in zip(reference, whole, parts, strict=True):
        assert step == number
        assert there == pytest.approx(here, rel=1e-3)
        assert again == (there if device == "cpu" else pytest.approx(there, rel=1e-4))
