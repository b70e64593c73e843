"""`python -m packer simulate`: how image sizes fill sequences, before a run is paid for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from packer.config import PackerConfig
from packer.plan.drop import BetaDrop, TokenDrop
from packer.plan.many import plan_lengths
from packer.plan.patch_size import OnePatchSize, PatchSizes
from packer.plan.place import Placement, Strategy
from packer.plan.resize import Crop, Native, NoCrop, ResizePolicy, Resolution
from packer.plan.simulate import Placed, PlacementReport, laion_sizes, place_lengths
from packer.shards import expand_shards
from packer.size_index import ShardIndex, index_shard, read_index
from packer.tools.sources import map_shards, read_size_list
from packer.tools.table import format_table, percent

_SHARES = (0.5, 0.9, 0.99, 1.0)  # of the sequences whose images fit into the E that is shown


class Simulated(NamedTuple):
    """One line of the table."""

    placed: Placed
    strategy: Strategy
    report: PlacementReport
    imbalance: float
    """Mean share by which the slowest rank's attention cost exceeds the ranks' mean."""


@dataclass(frozen=True)
class Simulate:
    """Plan sizes alone: padding, image slots, delay and balance by L and strategy."""

    images: int = 200_000
    """Images drawn from the fit to LAION-400M's sizes; not used with `sizes` or `shards`."""
    sizes: Path | None = None
    """A size list instead: .tsv or .csv with height and width (exif_orientation is applied), or a
    .npy of shape (n, 2)."""
    shards: tuple[str, ...] = ()
    """Tar shards instead, of which the images' headers (or size indices) are read."""
    repeat: int = 1
    """How often a size list's or the shards' images come, each time in another order."""
    seq_lens: tuple[int, ...] = (256, 1024, 4096)
    """Sequence lengths L in tokens."""
    strategies: tuple[Strategy, ...] = ("exact", "best_fit", "first_fit", "next_fit")
    """Placement strategies."""
    patch_size: int = 16
    """Side of a square patch in pixels, where `patch_sizes` draws none."""
    patch_sizes: PatchSizes = field(default_factory=OnePatchSize)
    """Distribution each image's patch size is drawn from; all sizes share sequences ("mixed")."""
    max_tokens: int | None = None
    """Token budget of one image before dropping; None means L."""
    max_images_per_seq: int | None = None
    """E, the paper's E_max: image slots per sequence; None sets no limit."""
    resize: ResizePolicy = "shrink_only"
    """Whether an image below its budget may be enlarged."""
    resolution: Resolution = field(default_factory=Native)
    """Distribution the side of an image is drawn from."""
    crop: Crop = field(default_factory=NoCrop)
    """A box in native pixels, drawn before the grid is chosen."""
    token_drop: TokenDrop = field(default_factory=lambda: BetaDrop(0.5, 0.9))
    """Distribution of the share of an image's tokens left out; the default is the widest of the
    paper's Figure 15a."""
    beta: tuple[float, float] | None = None
    """(a, b) of an unscaled Beta distribution that replaces `token_drop`; 5 5 is that of the
    README's table."""
    images_seen: int = 0
    """Images a run has seen before the first of these; where a schedule starts."""
    window: int = Placement.window
    """exact: images that wait before a sequence is built."""
    max_age: int = Placement.max_age
    """exact: pushes after which a waiting image is placed at once."""
    open_sequences: int = Placement.open_sequences
    """best_fit, first_fit: sequences open at a time."""
    ranks: int = 8
    """Ranks whose attention cost is compared; each reads a stream of its own."""
    sequences_per_batch: int = 8
    """B, sequences a rank takes each step."""
    width: int = 384
    """D, the model's width: an image of n tokens costs n^2 + 6 D n."""
    workers: int | None = None
    """Processes that read shards; None takes all cores where there is much to read."""
    seed: int = 0
    """Seed of every draw."""
    out: Path = Path("runs/packer/simulate.png")
    """Where the picture goes."""

    def __post_init__(self) -> None:
        for name in ("images", "repeat", "ranks", "sequences_per_batch", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.sizes is not None and self.shards:
            raise ValueError("simulate reads a size list or shards; got both. Leave one out.")
        if not self.seq_lens or not self.strategies:
            raise ValueError("simulate needs at least one of seq_lens and of strategies.")

    def run(self) -> int:
        """Print the tables and draw the picture."""
        from packer.tools.plots import draw_simulation  # matplotlib takes a second

        source, sizes = self._sizes()
        found = list(self.results(sizes))
        one = isinstance(self.patch_sizes, OnePatchSize)
        patch = f"patch {self.patch_size}" if one else repr(self.patch_sizes)
        title = f"{len(sizes):,} images {source}, {patch}, {self._settings()}"
        print(title)
        print(self._explain())
        print("\n" + results_text(found))
        print("\n" + slots_text([line for line in found if line.strategy == self.strategies[0]]))
        if self.max_images_per_seq is not None:
            print("\n" + self._overflow_text(found, self.max_images_per_seq))
        print(f"\npicture: {draw_simulation(found, self.out, title=title, simulate=self)}")
        return 0

    def results(self, sizes: npt.NDArray[np.integer[Any]]) -> Iterator[Simulated]:
        """Place the images (n, 2) with every L and strategy, under a progress bar."""
        jobs = [(L, strategy) for L in self.seq_lens for strategy in self.strategies]
        lengths: dict[int, npt.NDArray[np.int64]] = {}
        with tqdm(jobs, desc="Placing", unit="run", disable=None) as bar:
            for seq_len, strategy in bar:
                bar.set_postfix_str(f"L = {seq_len}, {strategy}")
                if seq_len not in lengths:
                    planned = plan_lengths(
                        sizes,
                        self._config(seq_len),
                        np.random.default_rng([self.seed, 1]),
                        beta=self.beta,
                        images_seen=self.images_seen,
                    )
                    lengths[seq_len] = planned.astype(np.int64)
                placed = place_lengths(
                    lengths[seq_len],
                    seq_len,
                    strategy=strategy,
                    max_images=self.max_images_per_seq,
                    **self._bounds(),
                )
                yield Simulated(placed, strategy, placed.report(), self._imbalance(placed))

    def _sizes(self) -> tuple[str, npt.NDArray[np.integer[Any]]]:
        """Return where the sizes come from, and (n, 2) heights and widths."""
        if self.sizes is None and not self.shards:
            return "of the LAION-400M fit", laion_sizes(self.images, self.seed)
        if self.sizes is not None:
            source = f"of {self.sizes.name}"
            sizes: npt.NDArray[np.integer[Any]] = read_size_list(self.sizes).sizes
        else:
            shards = expand_shards(self.shards)
            source, sizes = f"of {len(shards):,} shard(s)", shard_sizes(shards, self.workers)
        rng = np.random.default_rng([self.seed, 3])
        # In a list's own order neighbours are alike, which no shuffled stream would give.
        order = [rng.permutation(len(sizes)) for _ in range(self.repeat)]
        return source, sizes[np.concatenate(order)]

    def _config(self, seq_len: int) -> PackerConfig:
        taken = {item.name for item in fields(PackerConfig)} & {item.name for item in fields(self)}
        return PackerConfig(seq_len=seq_len, **{name: getattr(self, name) for name in taken})

    def _bounds(self) -> dict[str, int]:
        names = ("window", "max_age", "open_sequences")
        return {name: getattr(self, name) for name in names}

    def _imbalance(self, placed: Placed) -> float:
        steps = placed.imbalance(
            num_ranks=self.ranks, sequences_per_batch=self.sequences_per_batch, width=self.width
        )
        return float(steps.mean()) if len(steps) else float("nan")

    def _settings(self) -> str:
        drop = f"Beta{self.beta} drop" if self.beta else repr(self.token_drop)
        parts = [repr(self.resolution), self.resize, drop]
        parts += [] if isinstance(self.crop, NoCrop) else [repr(self.crop)]
        return ", ".join(parts)

    def _explain(self) -> str:
        limit = self.max_images_per_seq
        slots = "the largest count" if limit is None else str(limit)
        return (
            f"E = {slots}; delay in images; imbalance: cost n^2 + 6 D n of the slowest of "
            f"{self.ranks} ranks\nabove their mean, each a stream of its own, D = {self.width}, "
            f"{self.sequences_per_batch} sequences a rank and step"
        )

    def _overflow_text(self, found: Sequence[Simulated], limit: int) -> str:
        """Say what the paper's rule costs: place without a limit, then drop images beyond E."""
        lines = [
            f"The paper's rule, placing without a limit and dropping what exceeds E = {limit}, "
            "would\nlose these images; here none is lost:"
        ]
        for placed in (line.placed for line in found if line.strategy == self.strategies[0]):
            free = place_lengths(
                placed.lengths, placed.seq_len, strategy=self.strategies[0], **self._bounds()
            )
            dropped = free.overflow(limit)
            share = percent(dropped / len(placed.lengths))
            lines.append(f"  L = {placed.seq_len}: {dropped:,} ({share} %)")
        return "\n".join(lines)


def shard_sizes(shards: Sequence[str], workers: int | None = None) -> npt.NDArray[np.int32]:
    """Read the sizes (n, 2) of the shards' images from their headers or size indices.

    Raises:
        ValueError: If no image has a size that can be read.
    """
    found = list(map_shards(_index, shards, workers=workers, what="Reading headers"))
    sizes = np.concatenate([index.sizes for index in found])
    if not len(sizes):
        raise ValueError(
            f"the {len(shards)} shard(s) must hold images; no size could be read. See "
            "`python -m packer check`."
        )
    return sizes


def _index(shard: str) -> ShardIndex:
    return read_index(shard) or index_shard(shard)


def results_text(found: Sequence[Simulated]) -> str:
    """Lay out a line for each L and strategy."""
    head = ["L", "strategy", "padding\n%", "bound\n%", "images/\nseq.", "\nmax", "auto-\ncorr."]
    head += [
        "slots\nunused %",
        "delay\nmean",
        "\nmax",
        "with\nlength",
        "imbal-\nance %",
        "lengths/s",
    ]
    rows = []
    for placed, strategy, report, imbalance in found:
        rows.append(
            [
                str(placed.seq_len),
                strategy,
                percent(report.padding, 4),
                percent(report.bound, 4),
                f"{report.images_per_sequence:.2f}",
                str(report.images_per_sequence_max),
                f"{report.images_autocorrelation:.3f}",
                percent(report.slots_unused, 1),
                f"{report.delay:.0f}",
                str(report.delay_max),
                f"{report.delay_length_correlation:.2f}",
                "-" if np.isnan(imbalance) else percent(imbalance, 1),
                f"{report.lengths_per_second:,.0f}",
            ]
        )
    return format_table(head, rows, left=2)


def slots_text(found: Sequence[Simulated]) -> str:
    """Lay out what a number of image slots E would leave unused, and drop by the paper's rule."""
    rows = []
    for placed, strategy, _, _ in found:
        limits = np.quantile(placed.counts, _SHARES, method="inverted_cdf").astype(int)
        for limit in dict.fromkeys(limits.tolist()):
            share = float((placed.counts <= limit).mean())
            dropped = placed.overflow(limit)
            unused = 1 - (len(placed.lengths) - dropped) / (limit * len(placed.counts))
            rows.append(
                [
                    str(placed.seq_len),
                    strategy,
                    str(limit),
                    percent(share, 1),
                    percent(unused, 1),
                    percent(dropped / len(placed.lengths)),
                ]
            )
    head = [
        "L",
        "strategy",
        "E",
        "sequences\nwithin E, %",
        "slots\nunused %",
        "images the paper's\nrule would drop, %",
    ]
    return format_table(head, rows, left=2)
