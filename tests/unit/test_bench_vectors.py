"""The figures of `benchmarks.bench_vectors`: which images are taken, how vectors are compared."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_vectors
from benchmarks.bench_image_path import generated
from packer.decode import read_size


def heights(images: list[bytes]) -> list[int]:
    return [read_size(data).size.height for data in images]


def test_images_are_taken_at_the_quantiles_of_their_tokens() -> None:
    # 1 to 12 patches of 16 pixels in a column.
    images = [generated(1, (16, 16 * rows))[0] for rows in (7, 3, 12, 1, 9, 5, 2, 11, 4, 8, 6, 10)]

    for count, expected in ((1, [7]), (2, [4, 10]), (3, [3, 7, 11]), (99, range(1, 13))):
        found = heights(bench_vectors.evenly_spaced(images, count))
        assert found == [16 * rows for rows in expected]


def test_images_said_to_be_scaled_are_among_the_stored_ones_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for number, kind in enumerate(("original", "scaled", "recoded")):
            image = generated(1, (16, 16 * (number + 1)))[0]
            described = json.dumps({"bytes": kind}).encode()
            for name, data in ((f"{number}.jpg", image), (f"{number}.json", described)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))

    groups = bench_vectors._groups([tmp_path / "pairs.tar"], 5)

    assert [heights(images) for images in groups.values()] == [[16], [16, 32, 48]]
    with pytest.raises(ValueError, match="must hold RGB JPEGs of original size"):
        bench_vectors._groups([tmp_path], 5)


@given(angle=st.floats(0.0, 3.0), length=st.floats(0.5, 100.0))
def test_vectors_are_compared_by_value_by_norm_and_by_angle(angle: float, length: float) -> None:
    turn = torch.tensor(angle, dtype=torch.float64)
    expected = torch.tensor([[length, 0.0], [0.0, 5.0]], dtype=torch.float64)
    found = torch.stack([length * torch.stack([turn.cos(), turn.sin()]), expected[1]])

    told = bench_vectors._difference(found, expected)

    apart = max(1 - torch.cos(turn).item(), abs(torch.sin(turn).item()))
    assert told["largest_difference"] == pytest.approx(length * apart, abs=1e-9)
    chord = 2 * torch.sin(turn / 2).item()
    assert told["largest_difference_to_norm"] == pytest.approx(chord, abs=1e-9)
    assert told["least_cosine"] == pytest.approx(torch.cos(turn).item(), abs=1e-9)
    assert told["mean_cosine"] == pytest.approx((1 + torch.cos(turn).item()) / 2, abs=1e-9)
