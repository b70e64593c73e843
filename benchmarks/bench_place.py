"""Placement: padding by sequence length and strategy, and speed beside a pure-Python next fit."""

import gc
from dataclasses import asdict
from typing import Any

from benchmarks.harness import paired_ratio
from packer.config import PackerConfig
from packer.plan.place import pack_lengths
from packer.plan.resize import UniformSide
from packer.plan.simulate import laion_lengths, placement_report
from tests.reference.placement import next_fit

STRATEGIES = ("exact", "best_fit", "first_fit", "next_fit")


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Measure padding on LAION-like images and the paper's setting, then speed at L = 1024.

    Args:
        quick: Use 3,000 images instead of 200,000.
    """
    n = 3_000 if quick else 200_000
    rows: list[dict[str, Any]] = []
    print(f"{n} images, patch 16; delay in images, mean and longest; its correlation with length")
    print(
        f"{'images':14} {'L':>5} {'strategy':10} {'padding %':>9} {'bound %':>8} {'images/seq':>10}"
        f" {'autocorr.':>9} {'delay':>12} {'corr.':>6} {'lengths/s':>10}"
    )
    for name, seq_len, lengths in _settings(n):
        for strategy in STRATEGIES:
            report = placement_report(lengths, seq_len, strategy=strategy)
            rows.append(
                {"images": name, "seq_len": seq_len, "strategy": strategy, **asdict(report)}
            )
            print(
                f"{name:14} {seq_len:5} {strategy:10} {100 * report.padding:9.4f} "
                f"{100 * report.bound:8.4f} {report.images_per_sequence:10.2f} "
                f"{report.images_autocorrelation:9.3f} {report.delay:6.0f} {report.delay_max:5} "
                f"{report.delay_length_correlation:6.2f} {report.lengths_per_second:10.0f}"
            )
    rows.append(_speed(n, pairs=2 if quick else 10))
    return rows


def _settings(n: int) -> list[tuple[str, int, list[int]]]:
    settings: list[tuple[str, int, list[int]]] = []
    for seq_len in (256, 1024, 4096):
        lengths = laion_lengths(n, PackerConfig(seq_len=seq_len), beta=(5, 5))
        settings.append(("LAION-like", seq_len, lengths.tolist()))
    # The paper resizes every image to the side drawn, hence enlarging (NaViT section 3).
    paper = PackerConfig(seq_len=256, resolution=UniformSide(64.0, 256.0), resize="allow_enlarge")
    settings.append(("side U(64,256)", 256, laion_lengths(n, paper).tolist()))
    return settings


def _speed(n: int, pairs: int) -> dict[str, Any]:
    lengths = laion_lengths(n, PackerConfig(seq_len=1024), beta=(5, 5)).tolist()
    gc.disable()  # one pass over torch's objects takes longer than the whole next fit
    try:
        ratio = paired_ratio(
            lambda: pack_lengths(lengths, 1024), lambda: next_fit(lengths, 1024), pairs=pairs
        )
    finally:
        gc.enable()
    print(
        f"time of exact / plain next-fit loop at L = 1024: {ratio}; "
        f"{n / ratio.seconds_a:.0f} and {n / ratio.seconds_b:.0f} lengths/s"
    )
    return {"images": "LAION-like", "seq_len": 1024, "strategy": "exact", "speed": ratio}


if __name__ == "__main__":
    run()
