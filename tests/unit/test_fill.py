from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from packer.batch import BatchStats
from packer.config import PackerConfig
from packer.pack import pack
from packer.plan.drop import ConstantDrop, kept_indices
from packer.plan.fill import fill_leftover
from packer.plan.place import Placement
from packer.plan.types import Grid, ImagePlan, ImageSize
from tests.helpers.samples import cut_png, image_samples, naive_patches, noise, unpack

P = 8


def plan(key: str, rows: int, cols: int, kept: int) -> ImagePlan:
    return ImagePlan(key, ImageSize(rows, cols), None, Grid(rows, cols), 1, kept, 5, 6, 7)


def image(draw: st.DrawFn, number: int) -> ImagePlan:
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return plan(str(number), rows, cols, draw(st.integers(1, rows * cols)))


@st.composite
def sequences(draw: st.DrawFn) -> tuple[ImagePlan, ...]:
    return tuple(image(draw, number) for number in range(draw(st.integers(0, 5))))


@given(sequences(), st.integers(0, 60))
def test_one_image_keeps_as_many_more_tokens_as_fill_the_sequence(
    sequence: tuple[ImagePlan, ...], extra: int
) -> None:
    seq_len = max(sum(image.num_kept for image in sequence) + extra, 1)

    filled = fill_leftover(sequence, seq_len)

    gains = [b.num_kept - a.num_kept for a, b in zip(sequence, filled, strict=True)]
    possible = [min(a.grid.num_tokens - a.num_kept, extra) for a in sequence]
    assert sum(gain != 0 for gain in gains) <= 1
    assert sum(gains) == max(possible, default=0)
    assert [b._replace(num_kept=a.num_kept) for a, b in zip(sequence, filled, strict=True)] == list(
        sequence
    )


def test_the_largest_image_that_can_is_chosen() -> None:
    """Its drop rate changes least."""
    small, large, full = plan("small", 4, 4, 8), plan("large", 6, 6, 18), plan("full", 9, 9, 81)
    assert fill_leftover((small, large, full), 112) == (small, large._replace(num_kept=23), full)
    assert fill_leftover((small, large, full), 107) == (small, large, full)


def run(samples: list[Any], **options: Any) -> tuple[dict[str, Any], BatchStats]:
    config = PackerConfig(
        patch_size=P,
        seq_len=30,
        token_drop=ConstantDrop(0.5),
        placement=Placement("next_fit"),
        **options,
    )
    batches = list(pack(samples, config, sequences_per_batch=2))
    for batch in batches:
        batch.check()
    found = {key: value for batch in batches for key, value in unpack(batch).items()}
    return found, sum((batch.stats for batch in batches), BatchStats())


def test_filling_lowers_padding_by_what_it_reports() -> None:
    samples = image_samples(40, unit=P)
    plain, without = run(samples)
    more, stats = run(samples, fill_leftover=True)

    assert without.tokens_filled == 0
    assert stats.tokens_filled >= 20
    assert stats.tokens == without.tokens + stats.tokens_filled
    assert (stats.places, stats.tokens_before_drop) == (without.places, without.tokens_before_drop)
    assert stats.padding < without.padding / 2
    assert plain.keys() == more.keys()
    for key, image in more.items():
        before = set(map(tuple, plain[key].positions.tolist()))
        assert before <= set(map(tuple, image.positions.tolist()))
        height, width = image.grid[0] * P, image.grid[1] * P
        pixels = noise(height, width, int(key))
        assert (image.patches == naive_patches(pixels, image.positions, P)).all()


def test_a_filled_image_that_is_broken_is_not_counted_as_filled() -> None:
    samples = image_samples(40, unit=P)
    for i in range(0, 40, 3):
        samples[i]["image"] = cut_png(5 * P, 5 * P, i)
    found, stats = run(samples, fill_leftover=True)

    drawn = sum(
        len(kept_indices(rows * cols, max(1, rows * cols - rows * cols // 2), 0))
        for rows, cols in (image.grid for image in found.values())
    )
    assert stats.skipped == {"decode_error": 14}
    assert stats.tokens == drawn + stats.tokens_filled
