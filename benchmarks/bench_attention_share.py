"""Attention's share of a block's time: block-diagonal, under a dense mask, and without segments.

One pre-norm block, forward, float32. Inside every run the attention itself (scores, softmax,
values; not the projections) is timed where the block calls it, so that share = attention / block
comes from one run. Held equal: block, tokens and threads. The forms:

- *images of 256 tokens*: what NaViT (arXiv:2307.06304), figure 4, assumes; block-diagonal;
- *LAION-like images*: lengths after resize (at most 1,024 tokens) and Beta token drop, packed
  into sequences of L; block-diagonal;
- *dense mask*: the images of 256 tokens under one boolean L x L mask, given to
  scaled_dot_product_attention as vit-pytorch's NaViT does;
- *one segment*: L tokens that all see each other, no mask.

Beside each share stands that of the operations. Of n tokens in one segment at width D, attention
needs 4 n^2 D and the rest of the block 24 n D^2, so the share is n / (n + 6 D).

Figure 4 of the paper shows the "overhead from extra attention due to packing, assuming 256 tokens
per image", up to 50 %, for 1, 2, 4 and 8 images over model dimensions 1,024 to 6,144; section 2.3
reads it as attention's proportion of the overall cost. It has no table and does not define the
overhead by a formula, so no value is read off it: the last panel has its axes, our measured shares
and the share of the operations.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import paired_ratio
from navit.model import NaViTConfig
from navit.model.attention import AttentionPlan, block_diagonal_attention
from navit.model.block import Block
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop
from packer.plan.place import pack_lengths
from packer.plan.simulate import laion_lengths

PICTURE = "attention_share.png"
WIDTHS = (192, 384, 768, 1024, 1280)
SEQ_LENS = (256, 512, 1024, 2048, 4096, 8192)
_HEAD_DIM, _IMAGE_TOKENS = 64, 256
_PAIRED_SEQ_LEN = 2048
"""Eight images of 256 tokens, the most that figure 4 packs."""
_TOKENS = 2048
"""Least number of tokens in a run: short sequences are measured several at a time."""
_SECONDS, _MAX_RUNS = 0.8, 8
"""A form is measured again until its runs took this long together, or so many times."""
_IMAGES, _LAION, _DENSE, _ONE = FORMS = (
    "images of 256 tokens",
    "LAION-like images",
    "dense mask",
    "one segment",
)
Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """Segments of a run, and how attention is computed over them."""

    name: str
    lengths: tuple[int, ...]
    """Tokens of each segment."""
    attend: Attend
    attended: int
    """Query-key pairs computed, segments by segment or over whole sequences."""

    def flop_share(self, width: int) -> float:
        """Return attention's share of the block's operations."""
        return self.attended / (self.attended + 6 * width * sum(self.lengths))


def run(quick: bool = False, picture: Path | None = None) -> Rows:
    """Measure all forms at every width and L, and draw them.

    Args:
        quick: Few and small sizes, to see that it runs.
        picture: PNG to write; None draws none, or with ``quick`` one that is thrown away.

    Returns:
        A row for each width, L and form, and for each width one of the whole block's time,
        block-diagonal against dense mask.
    """
    widths, seq_lens = ((64, 128), (256, 512)) if quick else (WIDTHS, SEQ_LENS)
    paired_len = seq_lens[-1] if quick else _PAIRED_SEQ_LEN
    print("Attention's share of a block's forward time (share of its operations), float32:")
    print(f"{'D':>5} {'L':>5}  " + "  ".join(f"{name:>21}" for name in FORMS))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows: Rows = []
        for width in widths:
            block = make_block(width)
            for seq_len in seq_lens:
                tokens = seq_len if quick else max(seq_len, _TOKENS)
                found = _measure(block, width, seq_len, tokens, quick=quick)
                print(f"{width:>5} {seq_len:>5}  " + "  ".join(map(_cell, found)), flush=True)
                rows += found
            rows.append(_compare(block, width, paired_len, pairs=2 if quick else 4))
    finally:
        torch.set_num_threads(threads)
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            draw_shares(rows, Path(folder) / PICTURE)
    elif picture is not None:
        print(f"picture: {draw_shares(rows, picture)}")
    return rows


def make_block(width: int) -> Block:
    """Make the block at a width: heads of 64 channels, an MLP of four times the width."""
    torch.manual_seed(0)
    shape = {"num_heads": width // _HEAD_DIM, "mlp_dim": 4 * width, "depth": 1}
    return Block(NaViTConfig.named("s", width=width, **shape)).eval()


def make_forms(seq_len: int, tokens: int) -> list[Form]:
    """Lay out ``tokens`` tokens, a multiple of L, in the four forms."""
    count = tokens // seq_len
    images = (_IMAGE_TOKENS,) * (tokens // _IMAGE_TOKENS)
    laion = laion_like(seq_len, count)
    mask = block_mask(seq_len)
    attended = {"blocks": sum(n * n for n in images), "whole": count * seq_len**2}
    return [
        Form(_IMAGES, images, block_diagonal_attention, attended["blocks"]),
        Form(_LAION, laion, block_diagonal_attention, sum(n * n for n in laion)),
        Form(_DENSE, images, partial(attend_dense, mask=mask), attended["whole"]),
        Form(_ONE, (seq_len,) * count, block_diagonal_attention, attended["whole"]),
    ]


def laion_like(seq_len: int, count: int) -> tuple[int, ...]:
    """Draw the segments of ``count`` full sequences of LAION-like images, shortest first.

    Of the sequences packed, those that have no padding are taken, so that tokens stay equal.
    """
    drop = BetaDrop(0.25, 0.4)
    limit = min(seq_len, 1024)
    config = PackerConfig(patch_size=16, seq_len=seq_len, max_tokens=limit, token_drop=drop)
    # Short images come many to a sequence: enough of them for twice the sequences needed.
    lengths = laion_lengths(max(400, count * seq_len // 50), config).tolist()
    sequences = ([lengths[i] for i in packed] for packed in pack_lengths(lengths, seq_len))
    full = list(islice((parts for parts in sequences if sum(parts) == seq_len), count))
    return tuple(sorted(length for parts in full for length in parts))


def block_mask(seq_len: int) -> Tensor:
    """Which of L tokens see each other where each image has 256: bool (L, L)."""
    image = torch.arange(seq_len) // _IMAGE_TOKENS
    return image[:, None] == image


def attend_dense(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, mask: Tensor) -> Tensor:
    """Attend over whole sequences of L under a mask; tensors (T, H, Dh)."""
    shape = (-1, len(mask), *q.shape[1:])
    q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)


# Measuring


def _measure(block: Block, width: int, seq_len: int, tokens: int, *, quick: bool) -> Rows:
    """Measure each form's share; runs of the forms take turns."""
    forms = make_forms(seq_len, tokens)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    timed: dict[str, list[tuple[float, float]]] = {form.name: [] for form in forms}
    enough = 0.0 if quick else _SECONDS
    if tokens <= _TOKENS:
        for form in forms:
            block_seconds(block, x, form)
    for _ in range(_MAX_RUNS):
        for form in forms:
            runs = timed[form.name]
            if not runs or sum(whole for _, whole in runs) < enough:
                runs.append(block_seconds(block, x, form))
    return [
        {
            "width": width,
            "seq_len": seq_len,
            "form": form.name,
            "tokens": tokens,
            "segments": len(form.lengths),
            "runs": len(timed[form.name]),
            "attention_seconds": median(attention for attention, _ in timed[form.name]),
            "block_seconds": median(whole for _, whole in timed[form.name]),
            "share": median(attention / whole for attention, whole in timed[form.name]),
            "flop_share": form.flop_share(width),
        }
        for form in forms
    ]


def block_seconds(block: Block, x: Tensor, form: Form) -> tuple[float, float]:
    """Run the block once; return the seconds of its attention and of the whole."""
    plan = AttentionPlan(form.lengths, x.device)
    with _attention(form.attend) as seconds, torch.inference_mode():
        start = perf_counter()
        block(x, plan)
        whole = perf_counter() - start
    return seconds[0], whole


@contextmanager
def _attention(attend: Attend) -> Iterator[list[float]]:
    """Compute attention by ``attend`` while inside, and note the seconds of each call."""
    seconds: list[float] = []

    def timed(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        start = perf_counter()
        out = attend(q, k, v, plan)
        seconds.append(perf_counter() - start)
        return out

    with mock.patch.object(import_module(Block.__module__), "block_diagonal_attention", timed):
        yield seconds


def _compare(block: Block, width: int, seq_len: int, pairs: int) -> dict[str, Any]:
    """Compare the whole block's time, block-diagonal / dense mask, on images of 256 tokens."""
    forms = {form.name: form for form in make_forms(seq_len, seq_len)}
    x = torch.randn(seq_len, width, generator=torch.Generator().manual_seed(1))
    ratio = paired_ratio(
        lambda: block_seconds(block, x, forms[_IMAGES]),
        lambda: block_seconds(block, x, forms[_DENSE]),
        pairs=pairs,
    )
    print(f"{width:>5} {seq_len:>5}  block, block-diagonal / dense mask: {ratio}", flush=True)
    return {
        "width": width,
        "seq_len": seq_len,
        "form": f"block of {_IMAGES}: block-diagonal / dense mask",
        "block_time_ratio": ratio,
    }


def _cell(row: dict[str, Any]) -> str:
    return f"{row['share']:>13.1%} ({row['flop_share']:>5.1%})"


# Drawing


def draw_shares(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the shares over L for both ways of masking, and over the width as in figure 4.

    Args:
        rows: What `run` measured.
        path: Written as PNG (or what its suffix says); its folder is created.

    Returns:
        ``path``.
    """
    shares = [row for row in rows if "share" in row]
    widths = sorted({row["width"] for row in shares})
    colours = dict(
        zip(widths, colormaps["viridis"](np.linspace(0, 0.85, len(widths))), strict=True)
    )
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for axes, form, title in (
        (panels[0], _DENSE, "Dense mask over the sequence"),
        (panels[1], _IMAGES, f"Block-diagonal, {_IMAGES}"),
        (panels[2], _LAION, f"Block-diagonal, {_LAION}"),
    ):
        for width, colour in colours.items():
            _draw_over_seq_len(axes, shares, form, width, colour)
        axes.set_title(title, size=10)
        axes.set_xlabel("L, tokens of a sequence")
        _power_axis(axes, sorted({row["seq_len"] for row in shares}))
    _draw_over_width(panels[3], shares)
    panels[0].set_ylabel("attention's share of the block")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylim(0, 1)
    time, operations = (
        Line2D([], [], color="0.4", marker=marker, ms=4, lw=1.2, ls=style, label=label)
        for marker, style, label in (("o", "-", "time"), ("", ":", "operations, n / (n + 6 D)"))
    )
    panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    panels[1].legend(handles=[time, operations], frameon=False, fontsize=8, loc="upper left")
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Attention's share of a transformer block, forward", weight="bold", size=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def _draw_over_seq_len(axes: Axes, shares: Rows, form: str, width: int, colour: Any) -> None:
    found = [row for row in shares if row["form"] == form and row["width"] == width]
    seq_lens = [row["seq_len"] for row in found]
    share, flop_share = ([row[name] for row in found] for name in ("share", "flop_share"))
    axes.plot(seq_lens, share, "o-", color=colour, ms=4, linewidth=1.4, label=f"D = {width}")
    axes.plot(seq_lens, flop_share, color=colour, linewidth=1, linestyle=":")


def _draw_over_width(axes: Axes, shares: Rows) -> None:
    """Draw the dense mask's share by the number of images packed, over the width."""
    seq_lens = [256 * count for count in (1, 2, 4, 8)]
    for seq_len, colour in zip(seq_lens, colormaps["plasma"](np.linspace(0.75, 0, 4)), strict=True):
        found = [row for row in shares if row["form"] == _DENSE and row["seq_len"] == seq_len]
        if not found:
            continue
        widths = [row["width"] for row in found]
        label = f"{seq_len // 256} packed"
        axes.plot(widths, [row["share"] for row in found], "o-", color=colour, ms=4, label=label)
        line = np.geomspace(min(widths), 6144, 100)
        axes.plot(line, seq_len / (seq_len + 6 * line), color=colour, linewidth=1, linestyle=":")
    _power_axis(axes, [192, 384, 768, 1536, 3072, 6144])
    axes.set_xlabel("D, model dimension")
    axes.set_title("Dense mask, axes of the paper's Fig. 4", size=10)
    axes.legend(fontsize=8, frameon=False)


def _power_axis(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
