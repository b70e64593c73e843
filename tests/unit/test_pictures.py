"""navit.train.pictures: loss.png and retrieval.png are written for any run, and say the truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from navit.train.pictures import draw_loss, draw_retrieval


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures in the order they were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def words(figure: Figure) -> str:
    texts = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        texts += [axes.get_title(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        legend = axes.get_legend()
        texts += [] if legend is None else [text.get_text() for text in legend.get_texts()]
    return "\n".join(texts)


def frames(figure: Figure) -> list[tuple[str, str]]:
    """(title, colour of the frame) of every image, row by row."""
    return [
        (axes.get_title(), str(axes.spines["left"].get_edgecolor()))
        for axes in figure.axes
        if axes.images
    ]


def training(count: int, loss: float = 2.0) -> list[dict[str, Any]]:
    return [{"event": "train", "step": i, "loss": loss, "lr": 1e-3} for i in range(count)]


def images(count: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    rng = np.random.default_rng(0)
    sides = [(8, 12), (1, 40), (40, 1), (16, 16)]
    return [rng.integers(0, 256, (*sides[i % 4], 3), dtype=np.uint8) for i in range(count)]


@settings(max_examples=8, deadline=None)
@example(losses=[16777218.0])
@example(losses=[0.0, float("inf")])
@given(
    losses=st.lists(
        st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=40
    )
)
def test_any_sequence_of_losses_is_drawn(
    losses: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    path = draw_loss(records, tmp_path_factory.mktemp("loss") / "loss.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 200


def test_a_metrics_file_is_read_but_for_the_line_a_kill_cut(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    lines = [json.dumps(record) for record in training(5)]
    lines.append(json.dumps({"event": "eval", "step": 4, "text_to_image/recall@1": 0.8125}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"event": "train", "st')
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "new" / "loss.png")
    assert "text-to-image/recall@1: 81.2 %" in words(drawn[0])
    assert "learning rate" in words(drawn[0])


def test_evaluations_draw_recall_and_accuracies_but_no_chance_level(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    metrics = {
        "text_to_image/recall@1": 0.5,
        "text_to_image/recall@5": 0.9,
        "birds/prompt_accuracy@1": 0.25,
        "birds/shape_accuracy@1": 0.09,
        "chance/text_to_image/recall@1": 0.002,
        "num_pairs": 500,
    }
    draw_loss([*training(3), {"event": "eval", "step": 2, **metrics}], tmp_path / "loss.png")
    (results,) = [axes for axes in drawn[0].axes if axes.get_ylabel() == "validation"]
    shown = {str(line.get_label()).split(":")[0] for line in results.lines}
    assert shown == {"text-to-image/recall@1", "birds/prompt-accuracy@1", "birds/shape-accuracy@1"}


def test_a_step_written_twice_counts_once_with_its_later_value(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    draw_loss([*training(4, loss=9.0), *training(4, loss=1.0)], tmp_path / "loss.png")
    raw = drawn[0].axes[0].lines[0]
    assert list(raw.get_xdata()) == [0, 1, 2, 3]
    assert list(raw.get_ydata()) == [1.0] * 4


def test_smoothing_neither_lags_nor_bends_a_straight_line(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    draw_loss([{"step": i, "loss": 500.0 - i} for i in range(400)], tmp_path / "loss.png")
    smooth = np.asarray(drawn[0].axes[0].lines[1].get_ydata())
    np.testing.assert_allclose(smooth[10:-10], 500.0 - np.arange(10, 390), rtol=0, atol=1e-9)


def test_a_run_without_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one record.*got 1 records"):
        draw_loss([{"event": "eval", "step": 3}], tmp_path / "loss.png")


def test_green_frames_the_right_image_and_nothing_else(tmp_path: Path, drawn: list[Figure]) -> None:
    texts = ["a cat", "a dog", "a cat", "a bird"]
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.8, 0.0],
            [0.9, 0.1, 0.8, 0.7],
            [0.9, 0.1, 0.8, 0.0],
            [0.1, 0.2, 0.3, 0.4],
        ]
    )
    draw_retrieval(images(4), texts, similarity, tmp_path / "r.png", num_queries=4, top=2)
    colours = {colour for _, colour in frames(drawn[0])}
    assert len(colours) == 2
    green = frames(drawn[0])[0][1]  # both images of "a cat" are right for it
    assert [(title.split(":")[0], colour == green) for title, colour in frames(drawn[0])] == [
        ("1", True),
        ("2", True),
        ("1", False),
        ("2", False),
        ("4", True),  # missed: shown last with its rank
        ("1", True),
        ("2", True),
        ("1", True),
        ("2", False),
    ]
    assert "recall@1 75.0 % of 4" in words(drawn[0])
    assert "right image at rank 4" in words(drawn[0])


def test_a_tie_is_no_hit(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_retrieval(images(3), ["a", "b", "c"], torch.zeros(3, 3), tmp_path / "r.png")
    assert "recall@1 0.0 % of 3" in words(drawn[0])


def test_a_selection_of_images_states_no_recall(tmp_path: Path, drawn: list[Figure]) -> None:
    similarity = torch.tensor([[0.1, 0.5, 0.9]])
    path = tmp_path / "r.png"
    draw_retrieval(images(3), ["b"], similarity, path, image_texts=["b", "x", "y"], top=2)
    assert "recall" not in words(drawn[0])
    assert "not among the first 2" in words(drawn[0])
    assert [title.split(":")[0] for title, _ in frames(drawn[0])] == ["1", "2", "right"]


def test_long_foreign_and_odd_captions_are_drawn(tmp_path: Path) -> None:
    texts = ["word " * 200, "\u4e00\u53ea\u732b", "$5 and $6 \\frac", "", "x" * 300]
    draw_retrieval(images(5), texts, torch.eye(5), tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["a"]}, r"one text an image"),
        ({"similarity": torch.zeros(2, 3)}, r"got \(2, 3\)"),
        ({"num_queries": 0}, r"at least 1; got 0"),
        ({"image_texts": ["a", "other"]}, r"'b' has none"),
    ],
)
def test_disagreeing_arguments_are_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given_arguments: dict[str, Any] = {
        "images": images(2),
        "texts": ["a", "b"],
        "similarity": torch.eye(2),
    }
    with pytest.raises(ValueError, match=message):
        draw_retrieval(**{**given_arguments, **arguments}, path=tmp_path / "r.png")
