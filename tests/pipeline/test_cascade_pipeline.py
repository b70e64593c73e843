"""`navit evaluate --cascade`: thresholds of one half, figures of the other, for both models."""

import json
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from navit import CLIP, CLIPConfig, NaViTConfig, TextConfig
from navit.__main__ import main as navit_main
from navit.cascade import CascadeThresholds
from navit.evaluate.bootstrap import Interval, paired_bootstrap
from navit.evaluate.cascade import evaluate_cascade
from navit.evaluate.cascade_answers import CascadeSettings
from navit.evaluate.cascade_curve import draw_cascade
from navit.evaluate.cascade_data import LabelledImages, half_of
from navit.evaluate.cascade_report import CascadePoint, CascadeReport, format_cascade
from navit.evaluate.data import read_image_set
from navit.evaluate.source import Subject
from navit.model.classifier import Classifier, ClassifierConfig
from packer import PackerConfig
from packer.batch import BatchStats
from packer.captions import CaptionTokenizer
from packer.shards import write_shards
from tests.helpers.samples import BROKEN, encode_png

NAMES = ("red ant", "green bee", "blue crab")


def coloured(count: int) -> list[dict[str, Any]]:
    """Images of 16 to 40 px in which one of three colours is the class, two of them broken."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        height, width = rng.integers(2, 6, 2) * 8
        pixels = rng.integers(0, 160, (height, width, 3), dtype=np.uint8)
        pixels[..., i % 3] //= 2
        pixels[..., i % 3] += 60
        image = BROKEN if i in (5, 17) else encode_png(pixels)
        samples.append(
            {
                "key": f"s{i:04d}",
                "image": image,
                "label": i % 3,
                "caption": f"a {NAMES[i % 3]}",
                "json": {"set": "zoo", "class_name": NAMES[i % 3]},
            }
        )
    return samples


class Done(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str


def navit(*arguments: str | Path) -> Done:
    """Run a command in this process: starting one takes longer than these evaluations."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["navit", *map(str, arguments)])
        try:
            status = navit_main()
        except SystemExit as end:  # a setting that its own check refuses
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


class World(NamedTuple):
    """What the tests share."""

    model: Path
    shards: list[str]
    samples: list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("cascade")
    samples = coloured(60)
    pairs = [{**sample, "label": None} for sample in samples]
    shards = write_shards(pairs, root / "pairs-%d.tar", samples_per_shard=40)
    tokenizer = CaptionTokenizer.train((sample["caption"] for sample in samples), 300)
    torch.manual_seed(0)
    config = CLIPConfig(
        NaViTConfig.named("tiny", patch_size=8),
        TextConfig.named("tiny", vocab_size=tokenizer.vocab_size),
        embed_dim=16,
    )
    CLIP(config).save_pretrained(root / "model")
    tokenizer.save(root / "model" / "tokenizer.json")
    return World(root / "model", [str(path) for path in shards], samples)


def test_a_clip_is_measured_by_its_class_prompts(world: World, tmp_path: Path) -> None:
    out = tmp_path / "found.json"

    done = navit(
        *("evaluate", world.model, "--shards", *world.shards, "--metrics", "prompts"),
        *("--cascade", "4", "16", "--cascade-shares", "0.6", "0.9", "--json", out),
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["cascade"]
    half = Counter(
        half_of(f"pairs-{i // 40}.tar/{sample['key']}", 0)
        for i, sample in enumerate(world.samples)
        if sample["image"] is not BROKEN
    )
    assert (found["set_name"], found["num_classes"]) == ("zoo", 3)
    assert (found["solving_images"], found["images"]) == (half[0], half[1])
    assert sum(half.values()) == 58
    assert found["stats"]["skipped"] == {"decode_error": 2}
    methods = Counter(point["method"] for point in found["points"])
    # Where more tokens are of no use to an untrained model, both wishes lead to one cascade.
    cascades = len({str(p["thresholds"]["values"]) for p in found["points"] if p["thresholds"]})
    assert 1 <= methods["cascade"] == methods["random routing"] <= cascades
    assert (methods["one budget"], methods["exit fractions"]) == (2, 2)
    for point in found["points"]:
        assert sum(point["exit_fractions"]) == pytest.approx(1)
        if point["method"] in ("one budget", "cascade"):
            assert point["images_per_second"] > 0
        if point["thresholds"] is not None:
            CascadeThresholds.from_json(point["thresholds"])
    assert (tmp_path / "found-cascade.png").stat().st_size > 10_000
    assert "cascade 4 -> 16 tokens: zoo, 3 classes" in done.stdout
    assert str(tmp_path / "found-cascade.png") in done.stdout


def brightest(**options: Any) -> Classifier:
    """A classifier of 3 classes by hand: the channel that is brightest on average."""
    torch.manual_seed(0)
    config = ClassifierConfig(
        NaViTConfig.named("tiny", patch_size=8, pool="mean", **options), num_classes=3
    )
    model = Classifier(config)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def subject(model: Classifier) -> Subject:
    packing = PackerConfig(patch_size=8, seq_len=64, resize="allow_enlarge")
    return Subject(model, packing, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    folder = tmp_path_factory.mktemp("labels")
    write_shards(coloured(60), folder / "cls-%d.tar", samples_per_shard=60)
    images = read_image_set([folder / "cls-0.tar"], kind="classes")
    return LabelledImages(images, "cls", 3)


def test_a_classifier_is_measured_as_its_table_says(labelled: LabelledImages) -> None:
    report = evaluate_cascade(
        subject(brightest()),
        labelled,
        CascadeSettings((4, 9, 25), shares=(0.7, 1.5), progress=False),
    )

    single = report.of("one budget")
    assert [point.mean_tokens for point in single] == sorted(p.mean_tokens for p in single)
    assert all(point.mean_tokens <= b for point, b in zip(single, report.budgets, strict=True))
    # Random routing has the exits of the cascade, and of one budget what each stage is right in.
    for cascade, chance in zip(report.of("cascade"), report.of("random routing"), strict=True):
        assert cascade.exit_fractions == chance.exit_fractions
        wanted = np.dot(chance.exit_fractions, [point.accuracy for point in single])
        assert chance.accuracy == pytest.approx(wanted)
        # Nearly all images have as many tokens, so the exits decide the cost.
        assert cascade.mean_tokens == pytest.approx(chance.mean_tokens, rel=0.1)
        assert cascade.over_random is not None
        assert cascade.over_random.mean == pytest.approx(cascade.accuracy - chance.accuracy)
        assert cascade.over_last is not None
        assert cascade.over_last.mean == pytest.approx(cascade.accuracy - single[-1].accuracy)
        assert cascade.thresholds is not None
        assert cascade.thresholds.images == report.solving_images
    limits = [0.7 * single[-1].mean_tokens, 1.5 * single[-1].mean_tokens]
    for cascade, limit in zip(report.of("cascade"), limits, strict=False):
        assert cascade.thresholds is not None
        assert cascade.thresholds.mean_cost <= 1.1 * limit


def test_stages_may_differ_in_patch_size(labelled: LabelledImages) -> None:
    settings = CascadeSettings((6, 24), patch_sizes=(8, 4), shares=(0.8,), progress=False)

    report = evaluate_cascade(subject(brightest(patch_buffer=16)), labelled, settings)

    assert report.patch_sizes == (8, 4)
    tokens = [point.mean_tokens for point in report.of("one budget")]
    assert 3 < tokens[0] <= 6 < tokens[1] <= 24
    assert "of 8 -> 4 pixels" in format_cascade(report)


def test_a_folder_of_classes_is_read_too(tmp_path: Path) -> None:
    for i, sample in enumerate(coloured(12)):
        folder = tmp_path / NAMES[sample["label"]]
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.png").write_bytes(sample["image"])
    images = LabelledImages(read_image_set([tmp_path], classes=NAMES), "cls", 3)
    settings = CascadeSettings((4, 16), shares=(0.9,), progress=False)

    report = evaluate_cascade(subject(brightest()), images, settings)

    assert report.solving_images + report.images == 11
    assert report.stats.samples_read == 12


def test_what_has_no_classes_is_refused(world: World, tmp_path: Path) -> None:
    bare = [
        {"key": sample["key"], "image": sample["image"], "caption": sample["caption"]}
        for sample in world.samples[:10]
    ]
    shard = str(write_shards(bare, tmp_path / "bare-%d.tar", samples_per_shard=10)[0])
    for options, told in (
        (("--shards", shard, "--cascade", "4", "16"), "needs images with classes"),
        (("--shards", *world.shards, "--cascade", "16"), "two token budgets"),
        (("--shards", *world.shards, "--cascade", "16", "4"), "rise"),
        (
            ("--shards", *world.shards, "--cascade", "4", "16", "--cascade-shares", "0.01"),
            "at least that of the first stage",
        ),
        (
            ("--shards", *world.shards, "--cascade", "4", "16", "--cascade-patch-sizes", "8"),
            "a patch size for each",
        ),
    ):
        done = navit("evaluate", world.model, "--metrics", "prompts", *options)
        assert done.returncode == 2
        assert told in " ".join(done.stderr.split())


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    """95 % intervals of 400 paired differences with a known mean of 0.05."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        second = (rng.uniform(size=400) < 0.6).astype(float)
        gained = rng.uniform(size=400) < 0.05 / 0.4
        first = np.where(gained, 1.0, second)
        found = paired_bootstrap(first, second, resamples=400, seed=trial)
        assert found.low <= found.mean <= found.high
        covered += found.low <= 0.05 <= found.high
    assert 0.90 <= covered / 300 <= 0.985
    same = paired_bootstrap(second, second)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same images"):
        paired_bootstrap(np.ones(3), np.ones(4))


def test_a_report_draws_its_curves_and_prints_its_lines(tmp_path: Path) -> None:
    def point(method: str, tokens: float, accuracy: float, speed: float | None) -> CascadePoint:
        interval = None if method == "one budget" else Interval(-0.004, -0.009, 0.001)
        return CascadePoint(
            method, accuracy, 0.01, tokens, tokens * 1e6, (0.6, 0.4), None, speed, speed, interval
        )

    report = CascadeReport(
        "cls",
        10,
        (36, 144),
        (8, 8),
        500,
        510,
        (
            point("one budget", 36, 0.7, 900),
            point("one budget", 140, 0.9, 300),
            point("cascade", 70, 0.88, 500),
            point("random routing", 71, 0.78, None),
        ),
        BatchStats(),
    )

    text = format_cascade(report)
    path = draw_cascade(report, tmp_path / "deep" / "curve.png")

    assert path.stat().st_size > 10_000
    assert "figures of 510 others" in text
    assert "-0.4 (-0.9 .. +0.1)" in text
    assert replace(report, points=()).of("cascade") == ()
