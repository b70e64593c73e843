"""Training on several ranks: stopped, killed, resumed on other numbers of ranks, out of room."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from navit.model.clip import CLIP
from navit.serialize import from_plain
from navit.train.checkpoint import find_checkpoint, load_tensors, read_state, stored_tensors
from navit.train.config import TrainConfig
from navit.train.metrics import read_metrics
from navit.train.restore import load_trained
from packer.stream import PackedStream
from tests.helpers.launches import RECORD, ROOT, Ended, Launch, launch, train_args
from tests.helpers.samples import image_samples, make_shards

STREAMS = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """48 pairs in 6 shards."""
    return make_shards(tmp_path_factory.mktemp("shards"), image_samples(48), 8)


def all_tensors(run: Path) -> dict[str, dict[str, Tensor]]:
    """Read every tensor of a run's newest checkpoint."""
    path = find_checkpoint(run)
    found = {
        group: {name: torch.zeros(info.shape, dtype=info.dtype) for name, info in infos.items()}
        for group, infos in stored_tensors(path).items()
    }
    load_tensors(path, found)
    return found


def losses(run: Path) -> list[tuple[int, float]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]


def recorded(run: Path) -> dict[int, list[list[str]]]:
    """Return the keys of the batches each stream gave, in the order of the steps."""
    rows = [
        json.loads(line)
        for path in run.glob("batches-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    streams = defaultdict(list)
    for _, stream, keys in sorted(rows, key=lambda row: row[0]):
        streams[stream].append(keys)
    return dict(streams)


def assert_streams_never_stopped(run: Path, shards: list[str]) -> None:
    """Every stream gave the batches it gives to one reader that never stops, each once."""
    config = from_plain(TrainConfig, read_state(find_checkpoint(run))["config"])
    stream = PackedStream(
        shards,
        config.packer,
        sequences_per_batch=config.sequences_per_batch,
        shuffle_window=config.shuffle_window,
        num_streams=STREAMS,
    )
    streams = recorded(run)
    longest = max(len(batches) for batches in streams.values())
    expected = defaultdict(list)
    for batch in islice(stream, STREAMS * longest):
        assert batch.state is not None
        expected[batch.state["stream"]].append(list(batch.keys))
    for number, batches in streams.items():
        assert batches == expected[number][: len(batches)]


def test_a_run_goes_on_with_other_numbers_of_ranks_and_loses_no_sample(
    shards: list[str], tmp_path: Path
) -> None:
    run, options = tmp_path / "run", ("--num-streams", str(STREAMS), "--val", shards[0])

    def on(ranks: int, steps: int, *more: str) -> Launch:
        args = train_args(shards, run, *options, "--steps", str(steps), *more)
        return Launch(args, ranks, patch=RECORD)

    ended = launch(tmp_path, [on(2, 7), on(1, 12, "--resume"), on(3, 16, "--resume")])

    assert [one.status for one in ended] == [[0, 0], [0], [0, 0, 0]]
    for one in ended:
        assert "image to text" in one.stdout[0], one.stderr[0]
        assert not any(one.stdout[1:]), "only rank 0 prints"
        assert not any("step/s" in text for text in one.stderr[1:])
    assert "cpu x 3 ranks, float32, steps 12 to 16" in ended[2].stderr[0]
    assert [step for step, _ in losses(run)] == list(range(1, 17))
    assert_streams_never_stopped(run, shards)
    assert sum(map(len, recorded(run).values())) == 2 * 7 + 5 + 3 * 4
    images = sum(len(keys) for batches in recorded(run).values() for keys in batches)
    assert read_state(find_checkpoint(run))["stats"]["images"] == images
    assert load_trained(run).evaluate(
        [shards[0]], sequences_per_batch=2, device=torch.device("cpu")
    ).metrics == pytest.approx(json.loads((run / "result.json").read_text())["metrics"])


def finished(one: Ended) -> None:
    assert set(one.status) == {0}, one.stderr


@pytest.mark.slow
def test_a_run_stopped_on_any_rank_resumes_bit_for_bit_on_as_many(
    shards: list[str], tmp_path: Path
) -> None:
    def args(name: str, *more: str) -> list[str]:
        return train_args(shards, tmp_path / name, "--steps", "12", *more)

    stop = {"ranks": 2, "kill_at": 4}
    ended = launch(
        tmp_path,
        [
            Launch(args("whole"), 2),
            Launch(args("stopped"), kill=(1, signal.SIGTERM), **stop),
            Launch(args("stopped", "--resume"), 2),
            Launch(args("late", "--time-limit", "0.01"), 2),
            Launch(args("late", "--resume"), 2),
        ],
    )

    for one in ended:
        finished(one)
    for stopped in (ended[1], ended[3]):
        assert "stopped early; go on with" in stopped.stdout[0]
    for name in ("stopped", "late"):
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        torch.testing.assert_close(
            all_tensors(tmp_path / name), all_tensors(tmp_path / "whole"), rtol=0, atol=0
        )


@pytest.mark.slow
def test_a_sharded_run_goes_on_sharded_otherwise_and_whole(
    shards: list[str], tmp_path: Path
) -> None:
    """FSDP2 on 2 ranks, then on 3, then DDP: as DDP all along, up to the order of sums."""

    def args(name: str, strategy: str, steps: int, *more: str) -> list[str]:
        options = ("--num-streams", str(STREAMS), "--val", shards[0], "--steps", str(steps))
        drop = ("--model.vision.drop-path", "0")  # draws are of each rank
        # Whole steps from the first one on, so that nine of them move the weights.
        rate = ("--optim.warmup-steps", "0", "--optim.cooldown-steps", "0")
        strategy_option = ("--parallel.strategy", strategy)
        return train_args(shards, tmp_path / name, *options, *drop, *rate, *strategy_option, *more)

    ended = launch(
        tmp_path,
        [
            launched
            for name, strategies in (("fsdp", ("fsdp2", "fsdp2", "ddp")), ("ddp", ("ddp",) * 3))
            for launched in (
                Launch(args(name, strategies[0], 4), 2),
                Launch(args(name, strategies[1], 7, "--resume"), 3),
                Launch(args(name, strategies[2], 9, "--resume"), 2),
            )
        ],
    )

    for one in ended:
        finished(one)
    found, expected = all_tensors(tmp_path / "fsdp"), all_tensors(tmp_path / "ddp")
    config = from_plain(TrainConfig, read_state(find_checkpoint(tmp_path / "ddp"))["config"])
    torch.manual_seed(config.seed)
    start = CLIP(config.model).state_dict()
    # Steps of AdamW and Muon make much of the last digits: a small part of what nine steps moved.
    for group in ("model", "ema"):
        assert found[group].keys() == expected[group].keys()
        for name, value in expected[group].items():
            if name == "num_updates":
                assert found[group][name] == value == 9
                continue
            moved = value - start[name.removeprefix("average/")]
            assert moved.abs().max() > 1e-3, name
            assert (found[group][name] - value).norm() < 0.03 * moved.norm(), name
    assert found["optimizer"].keys() == expected["optimizer"].keys()
    for name, value in expected["optimizer"].items():
        assert (found["optimizer"][name] - value).norm() <= 0.01 * value.norm(), name


@pytest.mark.slow
def test_two_ranks_are_one_that_takes_two_batches_a_step_with_one_loss(
    shards: list[str], tmp_path: Path
) -> None:
    """The same global batches, from the same streams: equal up to the order of sums."""

    def args(name: str, *more: str) -> list[str]:
        options = ("--num-streams", "2", "--model.vision.drop-path", "0")
        # Without a cool-down the schedule does not depend on the number of steps.
        return train_args(shards, tmp_path / name, *options, "--optim.cooldown-steps", "0", *more)

    cached = ("--parallel.accumulate", "2", "--parallel.gradient-cache")
    ended = launch(
        tmp_path,
        [
            Launch(args("ranks", "--steps", "8"), 2),
            Launch(args("cached", *cached, "--steps", "5")),
            Launch(args("cached", *cached, "--steps", "8", "--resume")),
        ],
    )

    for one in ended:
        finished(one)
    ranks, cached_ones = (dict(losses(tmp_path / name)) for name in ("ranks", "cached"))
    assert list(ranks) == list(range(1, 9))
    assert cached_ones == pytest.approx(ranks, rel=1e-3)
    positions = [
        read_state(find_checkpoint(tmp_path / name))["loader"]["streams"]
        for name in ("ranks", "cached")
    ]
    assert positions[0] == positions[1]


TRACED = """
import sys
import torch
from torch._dynamo.backends.debugging import aot_eager
compile = torch.compile
def backend(graph, inputs, **options):  # as for any backend, without making code: it takes minutes
    print("a graph was made", file=sys.stderr)
    return aot_eager(graph, inputs, **options)
def traced(function, **options):
    return compile(function, **{**options, "backend": backend})
torch.compile = traced
"""


@pytest.mark.slow
def test_compiled_towers_train_on_ranks_as_eager_ones(shards: list[str], tmp_path: Path) -> None:
    def args(name: str, *more: str) -> list[str]:
        return train_args(shards, tmp_path / name, "--steps", "6", *more)

    ended = launch(
        tmp_path,
        [Launch(args("eager"), 2), Launch(args("compiled", "--compile"), 2, patch=TRACED)],
        timeout=200,
    )

    for one in ended:
        finished(one)
    eager, compiled = (dict(losses(tmp_path / name)) for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert all("a graph was made" in text for text in ended[1].stderr)
    assert not any("a graph was made" in text for text in ended[0].stderr)


@pytest.mark.slow
def test_a_folder_is_classified_on_changing_numbers_of_ranks(tmp_path: Path) -> None:
    """Each image once an epoch; a rank that has no batch at the end of one takes part."""
    folder = tmp_path / "images"
    for sample in image_samples(30):
        path = folder / f"class-{sample['label'] % 3}" / f"{sample['key']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["image"])
    drop = ("packer.token-drop:no-drop",)
    patch = RECORD.replace('batch.state["stream"]', "0")

    def on(ranks: int, steps: int, *more: str) -> Launch:
        args = train_args([str(folder)], tmp_path / "run", "--steps", str(steps), *more, *drop)
        args[1] = "classify"
        return Launch(args, ranks, patch=patch)

    ended = launch(tmp_path, [on(2, 4), on(3, 9, "--resume"), on(2, 30, "--resume")])

    for one in ended:
        finished(one)
    (batches,) = recorded(tmp_path / "run").values()
    assert min(map(len, batches)) == 0, "some batch is to be empty"
    counts = Counter(key for keys in batches for key in keys)
    epochs = read_state(find_checkpoint(tmp_path / "run"))["loader"]["epoch"]
    assert epochs >= 2
    assert len(counts) == 30
    assert set(counts.values()) <= {epochs, epochs + 1}
    assert len(losses(tmp_path / "run")) == 30


FULL = """
import resource
from navit.train.state import TrainState
real = TrainState.save
def full(self):
    if rank == 1 and self.step >= 4:  # no file of this rank may grow any more
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    return real(self)
TrainState.save = full
"""
BAD = """
from navit.model import CLIP
good = CLIP.forward
def bad(self, batch):
    out = good(self, batch)
    bad.calls += 1
    if rank == 1 and bad.calls > 2:
        out.image.data.fill_(float("nan"))
    return out
bad.calls = 0
CLIP.forward = bad
"""
NO_ROOM = """
from navit.train.metrics import MetricsLog
real = MetricsLog.write
def write(self, event, step, values):
    if rank == 0 and step == 3:
        raise OSError(28, "No space left on device")
    real(self, event, step, values)
MetricsLog.write = write
"""
BROKEN = """
from packer.stream import PackedStream
real = PackedStream.__iter__
def broken(self):
    for number, batch in enumerate(real(self)):
        if rank == 1 and number == 3:
            raise OSError("the disk of rank 1 is gone")
        yield batch
PackedStream.__iter__ = broken
"""


@pytest.mark.slow
def test_a_rank_that_cannot_go_on_ends_all_with_its_reason_and_whole_checkpoints(
    shards: list[str], tmp_path: Path
) -> None:
    def args(name: str, steps: int, *more: str) -> list[str]:
        options = ("--steps", str(steps), "--checkpoint-every", "2", "--max-bad-losses", "3")
        options += ("--parallel.timeout-minutes", "0.1")
        # Without a cool-down the schedule does not depend on the number of steps.
        options += ("--optim.warmup-steps", "0", "--optim.cooldown-steps", "0")
        return train_args(shards, tmp_path / name, *options, *more)

    def failing(name: str, patch: str = "", **stop: object) -> Launch:
        return Launch(args(name, 300), ranks=2, patch=patch, **stop)  # type: ignore[arg-type]

    full, log, bad, broken, killed, taken, *rest = launch(
        tmp_path,
        [
            failing("full", FULL),
            failing("log", NO_ROOM),
            failing("bad", RECORD + BAD),
            failing("broken", BROKEN),
            failing("killed", kill=(1, signal.SIGKILL)),
            failing("full"),
            Launch(args("killed", 60, "--resume"), 2),
            Launch(args("whole", 60), 2),
        ],
        timeout=200,
    )

    assert full.status == [1, 1], full.stderr
    assert "the checkpoint of step 4 must be written whole" in full.stderr[0]
    assert "it could not (rank 1: [Errno 27] File too large)" in full.stderr[0]
    assert find_checkpoint(tmp_path / "full").name == "step-00000002"

    assert log.status == [1, 1], log.stderr
    assert "room to write the run's files; found [Errno 28] No space left" in log.stderr[0]
    assert "rank 1 lost one" in log.stderr[1]
    assert find_checkpoint(tmp_path / "log").name == "step-00000002"

    assert bad.status == [1, 1], bad.stderr
    assert "one was nan in the last of 3 bad steps in a row" in bad.stderr[0]
    lines = read_metrics(tmp_path / "bad" / "metrics.jsonl")
    found = {line["step"]: line["keys"] for line in lines if line["event"] == "bad_loss"}
    assert list(found) == [3, 4, 5]
    given = defaultdict(list)
    for rank in range(2):
        for row in (tmp_path / "bad" / f"batches-{rank}.jsonl").read_text().splitlines():
            step, _, keys = json.loads(row)
            given[step + 1] += keys
    assert found == {step: given[step] for step in found}
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2]

    assert broken.status[0] == 1
    assert "another rank could not read its next batch" in broken.stderr[0]
    assert "the disk of rank 1 is gone" in broken.stderr[1]

    assert killed.status == [1, -signal.SIGKILL], killed.stderr
    assert "rank 0 lost one, which was killed or is stuck" in killed.stderr[0]
    assert killed.seconds < 20
    assert taken.status == [2, 1]
    assert "already holds a run. Continue it with --resume" in taken.stderr[0]
    assert "rank 0 could not go on, so no rank can" in taken.stderr[1]
    for one in (full, log, bad, killed, taken):
        assert not any("Traceback" in text for text in one.stderr)
    for one in rest:
        finished(one)
    torch.testing.assert_close(
        all_tensors(tmp_path / "killed"), all_tensors(tmp_path / "whole"), rtol=0, atol=0
    )


@pytest.mark.slow
def test_a_rank_that_is_stuck_ends_the_others_once_the_timeout_has_passed(
    shards: list[str], tmp_path: Path
) -> None:
    options = ("--steps", "300", "--parallel.timeout-minutes", "0.1")
    args = train_args(shards, tmp_path / "run", *options)

    (stuck,) = launch(tmp_path, [Launch(args, 3, kill=(1, signal.SIGSTOP), frozen=(1,))])

    assert (stuck.status[0], stuck.status[2]) == (1, 1)
    assert "which was killed or is stuck" in stuck.stderr[0]
    assert 5 < stuck.seconds < 40


@pytest.mark.slow
def test_torchrun_trains_and_only_rank_0_prints(shards: list[str], tmp_path: Path) -> None:
    """The command a user types. After "--" torchrun does not take --run for its own --run-path."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    args = train_args(
        shards, tmp_path / "run", "--steps", "6", "--val", shards[0], "--workers", "2"
    )

    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "--", "navit", *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept tokens/s") == 1
    assert len(losses(tmp_path / "run")) == 6
