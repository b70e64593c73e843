"""The experiments hold compute equal, and their tables say what their runs came to."""

import json
from collections.abc import Sequence
from dataclasses import astuple, replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.experiments.__main__ import Options, jobs, main, resolve_budget
from benchmarks.experiments.arms import EXPERIMENTS, Arm, Scale, arm_config, packing
from benchmarks.experiments.budget import Samples, plan_run
from benchmarks.experiments.data import DataSet, data_sets
from benchmarks.experiments.run import ArmResult, Point, agrees
from benchmarks.experiments.summary import Spread, compute_to, format_table, summarise
from navit.train.flops import STEP_OVER_FORWARD, image_flops, text_flops
from packer.decode import read_size
from packer.plan.image import plan_image
from packer.plan.place import pack_lengths
from packer.plan.types import ImageSize
from packer.shards import iter_shard

ARMS = {arm.name: arm for experiment in EXPERIMENTS.values() for arm in experiment.arms}
SCALE = Scale(16)
BUDGET = 1e13
FAST = ("vit", "vit-small", "navit", "drop-falling", "drop-rising", "patch-flexible")
"""Arms whose compute is checked in `make test`: one of each kind."""


def drawn_samples(arm: Arm, count: int = 1500) -> Samples:
    """Sizes of 256 px and more with captions of 8 to 23 tokens; squares for a square arm."""
    rng = np.random.default_rng(1)
    if arm.sampling == "square":
        sizes = np.full((count, 2), arm.side * SCALE.patch_size)
    else:
        sizes = rng.integers(256, 700, (count, 2))
    return Samples(sizes.astype(np.int64), tuple(rng.integers(8, 24, count).tolist()))


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(arm, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, arm in ARMS.items()
    ],
)
def test_every_arm_costs_the_budget_within_two_percent(arm: Arm) -> None:
    """Checked image by image with the keyed plans that training makes, on the arm's own steps."""
    samples = drawn_samples(arm)
    config = arm_config(arm, SCALE, images=1, steps=1, seed=0)
    plan = plan_run(config.model, arm, SCALE, samples, BUDGET)

    packed = packing(arm, SCALE, images=plan.images)
    seen = np.linspace(0, plan.images - 1, 6000).astype(int)  # every so manyth image of the run
    kept, captions, patches = [], [], []
    for number in seen.tolist():
        index = number % len(samples.sizes)
        size = ImageSize(*samples.sizes[index].tolist())
        image = plan_image(f"{number}", size, packed, images_seen=number)
        kept.append(image.num_kept)
        patches.append(image.patch_size)
        captions.append(samples.captions[index])
    model = config.model
    flops = image_flops(model.vision, kept) + text_flops(model.text, captions)
    side = model.vision.patch_size
    pixels = sum(n * (size**2 - side**2) for n, size in zip(kept, patches, strict=True))
    flops += 2 * 3 * model.vision.width * pixels  # patches of other sizes than the model's
    flops += 2 * len(kept) * (model.vision.width + model.text.width) * model.embed_dim
    sequences = len(pack_lengths(kept, SCALE.seq_len))
    spent = STEP_OVER_FORWARD * flops / sequences * plan.steps * SCALE.sequences

    assert spent == pytest.approx(BUDGET, rel=0.02)
    assert plan.flops == pytest.approx(BUDGET, rel=0.02)


def test_arms_of_one_name_are_one_arm_and_mean_drop_rates_are_equal() -> None:
    found: dict[str, Arm] = {}
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms:
            # A shared arm is trained once, so nothing but its label may differ.
            assert replace(found.setdefault(arm.name, arm), what="") == replace(arm, what="")
            assert arm.train_tokens in arm.budgets or arm.patch_size(SCALE) in arm.budgets
    tokens = {
        name: packing(ARMS[name], SCALE, images=1000).token_drop
        for name in ("drop-constant", "navit", "drop-falling", "drop-rising")
    }
    for drop in tokens.values():
        draws = np.random.default_rng(0).integers(0, 2**63, 1000).tolist()
        rates = [drop.rate(100, draw, number) for number, draw in enumerate(draws)]
        assert np.mean(rates) == pytest.approx(0.5, abs=0.02)


def test_a_budget_below_one_step_is_refused() -> None:
    arm = ARMS["navit"]
    model = arm_config(arm, SCALE, images=1, steps=1, seed=0).model
    with pytest.raises(ValueError, match="must pay for a step"):
        plan_run(model, arm, SCALE, drawn_samples(arm, 50), 1.0)


def point(flops: float, quality: float, images: float = 0.0) -> Point:
    return Point(step=0, flops=flops, images=images, quality=quality)


def result(arm: str, seed: int, points: Sequence[Point], budgets: dict[int, float]) -> ArmResult:
    metrics = {budget: {"recall": value, "mean_tokens": 9.0} for budget, value in budgets.items()}
    return ArmResult("demo", arm, seed, "recall", 1.0, 1.0, tuple(points), metrics)


@pytest.mark.parametrize(
    ("qualities", "wanted", "expected"),
    [
        ([0.2, 0.6], 0.4, 15.0),  # half way between the two evaluations
        ([0.4, 0.6], 0.2, 5.0),  # on the way from nothing
        ([0.5, 0.1, 0.5], 0.3, 25.0),  # the first peak is lost again
        ([0.2, 0.3], 0.3, 20.0),
        ([0.5, 0.3], 0.4, None),
        ([0.2, 0.3], 0.0, 0.0),
    ],
)
def test_compute_to_a_quality_is_read_off_the_curve(
    qualities: list[float], wanted: float, expected: float | None
) -> None:
    points = [point(10.0 * (n + 1), quality) for n, quality in enumerate(qualities)]
    assert compute_to(points, wanted) == pytest.approx(expected)


@given(values=st.lists(st.floats(-1, 1), min_size=2, max_size=5))
def test_a_spread_is_numpys(values: list[float]) -> None:
    found = Spread.of(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert found.std == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_a_spread_of_too_few_says_so() -> None:
    assert Spread.of([0.25]).text("+.1%") == "+25.0%"
    assert isnan(Spread.of([0.25]).std)
    assert Spread(nan, nan, 0).text(".1%") == "-"
    assert Spread.of([0.1, 0.2]).text("+.0%") == "+15% ± 7%"


def test_a_summary_is_what_was_computed_by_hand() -> None:
    experiment = EXPERIMENTS["a"]
    runs = [
        # Seed 0: the ViT ends at 0.4; NaViT has it at 25 of 100: 4 times less. 5 times the images.
        result("vit", 0, [point(50, 0.2), point(100, 0.4, 10)], {100: 0.4}),
        result(
            "navit",
            0,
            [point(25, 0.4), point(100, 0.6, 50)],
            {36: 0.5, 64: 0.7, 100: 0.6, 144: 0.6},
        ),
        # Seed 1: it has it half way between 0 and 100: 2 times less. 3 times the images.
        result("vit", 1, [point(50, 0.2), point(100, 0.3, 10)], {100: 0.3}),
        result(
            "navit",
            1,
            [point(50, 0.3), point(100, 0.6, 30)],
            {36: 0.5, 64: 0.4, 100: 0.6, 144: 0.2},
        ),
        # A seed the baseline lacks, and an arm of another experiment.
        result("navit", 2, [point(100, 0.9, 10)], dict.fromkeys((36, 64, 100, 144), 0.9)),
        result("fixed", 0, [point(100, 1.0, 10)], {100: 1.0}),
    ]

    vit, navit = summarise(experiment, runs)

    assert (vit.arm.name, vit.quality.mean, vit.difference.count) == ("vit", 0.35, 0)
    assert astuple(navit.quality) == pytest.approx((0.7, 0.03**0.5, 3))
    assert astuple(navit.difference) == pytest.approx((0.25, 0.005**0.5, 2))
    assert (navit.image_ratio.mean, navit.compute_ratio.mean) == (4.0, 3.0)
    assert navit.reached == 2
    # 64 tokens are best in seed 0 alone; (0.6 + 0.6 + 0.9) / 3 is the highest mean.
    assert navit.best_budget == 100
    assert navit.best.mean == pytest.approx(0.7)
    table = format_table(experiment, "demo", runs)
    assert "| resolution sampling + drop | 70.0% ± 17.3% | +25.0% ± 7.1% |" in table
    assert "3.00 ± 1.41 (2 of 2 reached) | 4.00 ± 1.41 |" in table


def test_a_stored_run_stays_one_of_its_settings_when_others_are_added() -> None:
    stored = {"steps": 5, "packer": {"patch_size": 8}}
    assert agrees(stored, {"steps": 5, "packer": {"patch_size": 8, "mixing": "x"}, "freeze": []})
    assert not agrees(stored, {"steps": 6, "packer": {"patch_size": 8}})
    assert not agrees(stored, {"steps": 5, "packer": {}})
    assert agrees({**stored, "loss_chunk": 512}, {**stored, "loss_chunk": None})  # time alone


def test_squares_are_whole_images_of_the_side_asked_for(tmp_path: Path) -> None:
    scenes = data_sets(tmp_path, quick=True)["demo"]
    small = replace(scenes, train=scenes.val)  # few images are enough

    squares = small.squashed(5, progress=False)

    raws = list(iter_shard(squares.val[0], on_problem=lambda cause, detail: pytest.fail(detail)))
    native = list(iter_shard(scenes.val[0], on_problem=lambda cause, detail: pytest.fail(detail)))
    assert [raw.members["txt"] for raw in raws] == [raw.members["txt"] for raw in native]
    assert {read_size(raw.members["png"]).size for raw in raws} == {ImageSize(80, 80)}
    assert [json.loads(r.members["json"]) for r in raws] == [
        json.loads(r.members["json"]) for r in native
    ]
    before = Path(squares.val[0]).stat().st_mtime_ns
    assert small.squashed(5, progress=False) == squares
    assert Path(squares.val[0]).stat().st_mtime_ns == before, "squares are made once"


def test_arms_shared_by_experiments_are_trained_once() -> None:
    sets: dict[str, Any] = {
        name: DataSet(name, (), (), Path(), SCALE) for name in ("demo", "pairs")
    }
    planned = list(jobs(Options(seeds=2), sets))
    names = [(job.data.name, job.arm.name, job.seed) for job in planned]
    assert len(names) == len(set(names)) == 2 * (24 + 3)
    # A whole seed of an experiment comes before the next, so that an early end leaves pairs.
    assert [job.seed for job in planned[:6]] == [0, 0, 0, 1, 1, 1]


def test_parts_are_all_runs_once_and_only_those_that_wait_for_no_other() -> None:
    sets: dict[str, Any] = {"demo": DataSet("demo", (), (), Path(), SCALE)}
    parts = [list(jobs(Options(only=("b", "c"), part=part, parts=3), sets)) for part in range(3)]
    whole = list(jobs(Options(only=("b", "c")), sets))
    assert [parts[i % 3][i // 3] for i in range(len(whole))] == whole
    assert sum(map(len, parts)) == len(whole)
    with pytest.raises(ValueError, match=r"part must be of 0 to parts - 1; got 3 of 3"):
        Options(part=3, parts=3)
    with pytest.raises(ValueError, match=r"\(e\) start from the weights of others"):
        Options(parts=2)


@pytest.fixture
def two_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave two arms of (a): a run from start to picture takes seconds."""
    experiment = EXPERIMENTS["a"]
    few = tuple(replace(arm, budgets=(arm.train_tokens,)) for arm in experiment.arms[::2])
    monkeypatch.setitem(EXPERIMENTS, "a", replace(experiment, arms=few))


@pytest.mark.slow
@pytest.mark.usefixtures("two_arms")
def test_the_command_ends_with_a_table_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    command = [
        *("--quick", "--only", "a", "--sets", "demo", "--seeds", "1", "--flops", "4e8"),
        *("--folder", str(tmp_path / "runs"), "--data", str(tmp_path / "data")),
    ]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "2 runs of 4e+08 FLOPs" in told
    assert "| resolution sampling + drop |" in told
    assert (tmp_path / "runs" / "a-demo.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "runs" / "summary.json").read_text())["results"]
    for found in results:
        # Some ten steps of a few images: what was spent differs from what was planned by chance.
        assert found["points"][-1]["flops"] == pytest.approx(4e8, rel=0.25)

    # One run is gone: it alone is made again, to the same result on the same machine.
    gone = tmp_path / "runs" / "runs" / "demo-navit-0"
    (gone / "arm.json").unlink()
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "[2/2]" in told
    assert "[1/2]" not in told
    again = json.loads((tmp_path / "runs" / "summary.json").read_text())["results"]
    for before, after in zip(results[1]["points"], again[1]["points"], strict=True):
        assert after == before | {"flops": pytest.approx(before["flops"])}
    assert torch.get_num_threads() == threads

    assert main([*command, "--flops", "2e9"]) == 2
    assert "all runs of a folder have one budget" in capsys.readouterr().err


def test_wrong_options_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belong together"):
        Options(shards=("a.tar",))
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        Options(seeds=0)
    options = Options(flops=5.0, folder=tmp_path)
    assert resolve_budget(options, {}) == 5.0
    assert resolve_budget(options, {}) == 5.0
