"""Placement: padding by sequence length, beside other packers, and speed in paired ratios.

Equal lengths in the same order go to every packer. Ours return indices; trl and grain also move
tokens (one byte each), which is part of how they pack; vit-pytorch groups image tensors of which
it reads the shapes alone.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks import peers
from benchmarks.harness import Paired, paired_ratio
from packer.config import PackerConfig
from packer.plan.place import pack_lengths
from packer.plan.resize import UniformSide
from packer.plan.simulate import laion_lengths, placement_report
from tests.reference.placement import next_fit

STRATEGIES = ("exact", "best_fit", "first_fit", "next_fit")
SPEED_SEQ_LEN = 1024
# grain places a thousand images a second: its padding and speed are those of fewer images.
_PADDING_IMAGES = {"grain": 10_000, "trl": 200_000, "vit-pytorch": 200_000}
_SPEED_IMAGES = {"grain": 2_000, "trl": 20_000, "vit-pytorch": 20_000}
_HEADING = (
    f"{'images':14} {'L':>5} {'packer':22} {'n':>6} {'padding %':>9} {'bound %':>8} "
    f"{'images/seq':>10} {'autocorr.':>9} {'delay':>12} {'corr.':>6} {'lengths/s':>10}"
)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Measure padding on LAION-like images and the paper's setting, then speed at L = 1024.

    Args:
        quick: Use 2,000 images instead of 200,000, and 200 for peers.
    """
    n = 2_000 if quick else 200_000
    rows: list[dict[str, Any]] = []
    print("patch 16; delay in images, mean and longest; its correlation with length")
    names = [name for name, package in peers.PLACERS.items() if peers.is_there(package)]
    if left_out := peers.missing(peers.PLACERS):
        print(left_out)
    print(_HEADING)
    for images, seq_len, lengths in _settings(n):
        setting = {"images": images, "seq_len": seq_len}
        for strategy in STRATEGIES:
            rows.append(setting | _ours(lengths, seq_len, strategy))
            _print_row(rows[-1])
        for name in names:
            few = 200 if quick else _PADDING_IMAGES[peers.PLACERS[name]]
            rows.append(setting | _peers_padding(name, lengths[:few], seq_len))
            _print_row(rows[-1])
    lengths = laion_lengths(n, PackerConfig(seq_len=SPEED_SEQ_LEN), beta=(5, 5)).tolist()
    rows.append(_speed("next fit, plain loop", lengths, next_fit, lengths, 2 if quick else 20))
    for name in names:
        few = lengths[: 200 if quick else _SPEED_IMAGES[peers.PLACERS[name]]]
        place, prepare = peers.placer(name)
        inputs = prepare(few, SPEED_SEQ_LEN)
        rows.append(_speed(name, few, place, inputs, 2 if quick else 6))
    return rows


def _settings(n: int) -> list[tuple[str, int, list[int]]]:
    settings: list[tuple[str, int, list[int]]] = []
    for seq_len in (256, 1024, 4096, 8192):
        lengths = laion_lengths(n, PackerConfig(seq_len=seq_len), beta=(5, 5))
        settings.append(("LAION-like", seq_len, lengths.tolist()))
    # The paper resizes every image to the side drawn, hence enlarging (NaViT section 3).
    paper = PackerConfig(seq_len=256, resolution=UniformSide(64.0, 256.0), resize="allow_enlarge")
    settings.append(("side U(64,256)", 256, laion_lengths(n, paper).tolist()))
    return settings


def _ours(lengths: list[int], seq_len: int, strategy: Any) -> dict[str, Any]:
    report = placement_report(lengths, seq_len, strategy=strategy)
    return {"packer": strategy, **asdict(report)}


def _peers_padding(name: str, lengths: list[int], seq_len: int) -> dict[str, Any]:
    place, prepare = peers.placer(name)
    filled = place(prepare(lengths, seq_len), seq_len)
    tokens = sum(lengths)
    if sum(filled) != tokens:
        raise RuntimeError(f"{name} must place {tokens} tokens; it placed {sum(filled)}.")
    return {
        "packer": name,
        "num_images": len(lengths),
        "num_sequences": len(filled),
        "padding": 1 - tokens / (seq_len * len(filled)),
        "bound": 1 - tokens / (seq_len * -(-tokens // seq_len)),
    }


def _print_row(row: dict[str, Any]) -> None:
    line = (
        f"{row['images']:14} {row['seq_len']:5} {row['packer']:22} {row['num_images']:6} "
        f"{100 * row['padding']:9.4f} {100 * row['bound']:8.4f}"
    )
    if "delay" in row:
        line += (
            f" {row['images_per_sequence']:10.2f} {row['images_autocorrelation']:9.3f} "
            f"{row['delay']:6.0f} {row['delay_max']:5} {row['delay_length_correlation']:6.2f} "
            f"{row['lengths_per_second']:10.0f}"
        )
    print(line, flush=True)


def _speed(
    name: str, lengths: list[int], other: Callable[[Any, int], Any], inputs: Any, pairs: int
) -> dict[str, Any]:
    """Compare `pack_lengths` with another packer on the same lengths at L = 1024."""
    gc.collect()
    gc.disable()  # one pass over torch's objects takes longer than the whole next fit
    try:
        ratio: Paired = paired_ratio(
            partial(pack_lengths, lengths, SPEED_SEQ_LEN),
            partial(other, inputs, SPEED_SEQ_LEN),
            pairs=pairs,
        )
    finally:
        gc.enable()
    print(
        f"time of exact / {name}, {len(lengths)} images, L = {SPEED_SEQ_LEN}: {ratio}; "
        f"{len(lengths) / ratio.seconds_a:.0f} and {len(lengths) / ratio.seconds_b:.0f} lengths/s",
        flush=True,
    )
    return {
        "images": "LAION-like",
        "seq_len": SPEED_SEQ_LEN,
        "packer": "exact",
        "against": name,
        "num_images": len(lengths),
        "time_ratio": ratio,
    }
