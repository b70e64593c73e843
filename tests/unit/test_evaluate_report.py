import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from navit.evaluate.curve import draw_curve, draw_metrics
from navit.evaluate.patch_curve import draw_patch_curve
from navit.evaluate.report import (
    Report,
    format_budgets,
    format_metrics,
    format_report,
    headline_metrics,
)
from navit.evaluate.results import BudgetResult, check_budgets, check_patch_sizes
from packer.batch import BatchStats

METRICS = {
    **{f"{d}/recall@{k}": 0.1 * k for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    **{
        f"chance/{d}_to_{e}/recall@{k}": 0.01
        for d, e in (("image", "text"), ("text", "image"))
        for k in (1, 5, 10)
    },
    "pets/prompt_accuracy@1": 0.4,
    "pets/prompt_accuracy@5": 0.8,
    "pets/prompt_class_recall": 0.35,
    "pets/10_shot_accuracy@1": 0.5,
    "pets/10_shot_std": 0.021,
    "pets/2_shot_accuracy@1": 0.3,
    "pets/2_shot_std": 0.05,
    "pets/linear_accuracy@1": 0.6,
    "pets/linear_strength": 0.01,
    "pets/shape_accuracy@1": 0.09,
}


def result(budget: int, **changes: Any) -> BudgetResult:
    stats = BatchStats(samples_read=21, images=20, tokens=18 * budget, places=20 * budget)
    values = {
        "max_tokens": budget,
        "metrics": METRICS,
        "stats": stats,
        "seconds": 4.0,
        "model_seconds": budget / 10,
        "captions": 40,
        "classes": {"pets": {"classes": 7, "images": 20, "train_images": 50}},
    }
    return BudgetResult(**(values | changes))


def report(*results: BudgetResult, **changes: Any) -> Report:
    values: dict[str, Any] = {"model": {"kind": "CLIP"}, "data": {}, "settings": {}}
    return Report(results, **(values | {"versions": {}} | changes))


def test_costs_are_per_image() -> None:
    found = result(50)

    assert found.mean_tokens == 45
    assert found.images_per_second == 5
    assert found.model_images_per_second == 4


def test_the_table_has_every_method_of_a_set_with_the_spread_of_the_draws() -> None:
    lines = format_metrics(METRICS, title="20 pairs", classes=result(9).classes).splitlines()
    rows = {line[:40].strip(): line[40:].split() for line in lines}

    assert rows["image to text"] == ["10.0%", "50.0%", "100.0%"]
    assert rows["pets, 7 classes"] == ["top", "1", "top", "5", "classes"]
    assert rows["caption prompts"] == ["40.0%", "80.0%", "35.0%"]
    assert rows["10-shot"] == ["50.0%", "-", "-", "+-", "2.1"]
    assert [name for name in rows if "shot" in name] == ["2-shot", "10-shot"]
    assert rows["shape alone"] == ["9.0%", "-", "-"]
    assert all(len(line) <= 80 for line in lines)


def test_the_budgets_table_has_a_column_a_budget() -> None:
    few = {name: value for name, value in METRICS.items() if "linear" not in name}
    lines = format_budgets([result(16, metrics=few), result(64)]).splitlines()
    rows = {line[:40].strip(): line[40:].split() for line in lines}

    assert rows["token budget"] == ["16", "64"]
    assert rows["tokens an image"] == ["14.4", "57.6"]
    assert rows["of the image tower alone"] == ["12.5", "3.1"]
    assert rows["linear probe"] == ["-", "60.0%"]


def test_the_table_of_patch_sizes_has_a_column_a_size_in_blocks() -> None:
    results = [result(900 // size, patch_size=size) for size in range(8, 18)]
    first, second = format_budgets(results).split("\n\n")

    rows = {line[:40].strip(): line[40:].split() for line in first.splitlines()}
    assert rows["patch size in pixels"] == ["8", "9", "10", "11", "12", "13", "14", "15"]
    assert rows["token budget"][:2] == ["112", "100"]
    assert second.splitlines()[0].split()[-2:] == ["16", "17"]
    assert len(second.splitlines()) == len(first.splitlines())
    pairs = [result(budget, patch_size=size) for budget in (16, 64) for size in (8, 16)]
    budgets = [block.splitlines()[1].split()[-2:] for block in format_budgets(pairs).split("\n\n")]
    assert budgets == [["16", "16"], ["64", "64"]]


def test_the_model_s_own_patch_size_is_the_one_shown_in_full() -> None:
    results = [result(4096 // size**2, patch_size=size) for size in (8, 16, 32)]

    own = format_report(report(*results, model={"patch_size": 16}))
    other = format_report(report(*results, model={"patch_size": 20}))
    one = format_report(report(results[0], model={"patch_size": 8}))

    assert own.startswith("at most 16 tokens an image (14.4 on average), patches of 16 pixels\n")
    assert other.startswith("at most 4 tokens an image (3.6 on average), patches of 32 pixels\n")
    assert one.startswith("at most 64 tokens an image (57.6 on average)\n")
    assert "patch size" not in one
    assert [r["patch_size"] for r in report(*results).to_json()["results"]] == [8, 16, 32]


@pytest.mark.parametrize("budgets", [(None,), (16, 64)])
def test_the_patch_curve_is_drawn_with_and_without_budgets(
    budgets: tuple[int | None, ...], tmp_path: Path
) -> None:
    results = [
        result(budget or 4096 // size**2, patch_size=size) for budget in budgets for size in (8, 16)
    ]
    path = draw_patch_curve(results, tmp_path / "new" / "curve.png", 16)
    with Image.open(path) as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 20
    with pytest.raises(ValueError, match="a recall or an accuracy to draw"):
        draw_patch_curve([result(16, metrics={})], tmp_path / "none.png", 16)


def test_a_report_says_what_was_skipped_and_noted() -> None:
    stats = BatchStats(samples_read=21, images=20, skipped={"decode_error": 1})
    text = format_report(report(result(16, stats=stats, notes=("a note",)), notes=("another",)))

    assert "decode_error" in text
    assert text.endswith("note: another\nnote: a note")
    assert "token budget" not in text


def test_a_report_is_json_with_a_result_a_budget() -> None:
    found = report(result(16), result(64), settings={"shards": ["a"]})

    again = json.loads(json.dumps(found.to_json()))

    assert [r["max_tokens"] for r in again["results"]] == [16, 64]
    assert again["results"][0]["metrics"] == pytest.approx(METRICS)
    assert again["results"][1]["mean_tokens"] == 57.6
    assert again["settings"] == {"shards": ["a"]}


def test_what_summarises_a_result_is_grouped() -> None:
    groups = headline_metrics([{}, METRICS, {"accuracy@1": 0.5}])

    assert list(groups) == ["retrieval", "the model's own classes", "pets"]
    assert list(groups["pets"].values()) == [
        *("caption prompts", "2-shot", "10-shot", "linear probe", "shape alone")
    ]


def test_the_curve_is_drawn_for_one_budget_or_several(tmp_path: Path) -> None:
    for results in ([result(16)], [result(b) for b in (16, 17, 64)]):
        path = draw_curve(results, tmp_path / "new" / f"{len(results)}.png")
        with Image.open(path) as picture:
            assert picture.width > 1000
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 20
    with pytest.raises(ValueError, match="a recall or an accuracy to draw"):
        draw_curve([result(16, metrics={})], tmp_path / "none.png")


def test_the_curve_has_quality_over_cost_and_the_spread_of_few_shots() -> None:
    name, spread = "pets/10_shot_accuracy@1", "pets/10_shot_std"
    results = [
        result(budget, metrics={**METRICS, name: quality, spread: quality / 10})
        for budget, quality in ((16, 0.2), (64, 0.5))
    ]
    axes = Figure().subplots()
    draw_metrics(axes, [15.0, 60.0], results, {name: "10-shot", "pets/linear_accuracy@1": "linear"})
    shots, linear = axes.containers
    assert (shots.get_label(), linear.get_label()) == ("10-shot", "linear")
    assert shots.lines[0].get_xydata().tolist() == [[15.0, 0.2], [60.0, 0.5]]
    low, high = (cap.get_ydata().tolist() for cap in shots.lines[1])
    assert (low, high) == (pytest.approx([0.18, 0.45]), pytest.approx([0.22, 0.55]))
    assert linear.lines[0].get_xydata().tolist() == [[15.0, 0.6], [60.0, 0.6]]
    assert axes.get_xscale() == "log"


def test_budgets_are_sorted_and_positive() -> None:
    assert check_budgets([64, 16, 64]) == (16, 64)
    with pytest.raises(ValueError, match="token budgets must be positive"):
        check_budgets([0])


def test_patch_sizes_are_sorted_and_positive() -> None:
    assert check_patch_sizes([16, 8, 16]) == (8, 16)
    with pytest.raises(ValueError, match="patch sizes must be positive, in pixels"):
        check_patch_sizes([8, -1])
