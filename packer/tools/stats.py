"""`python -m packer stats`: what a data set holds, before anything is decided about it."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from packer.config import PackerConfig
from packer.errors import SkipSample
from packer.plan.many import plan_resize_many
from packer.plan.simulate import laion_sizes
from packer.shards import expand_shards, image_extension, iter_shard, sample_from_raw
from packer.size_index import read_header
from packer.tools.sources import Shards, map_shards, read_size_list
from packer.tools.table import format_table

Values = npt.NDArray[Any]

_QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)


class ShardStats(NamedTuple):
    """What one shard's samples are like."""

    sizes: npt.NDArray[np.int64]
    """int64 (n, 2) heights and widths of the images whose header can be read, in pixels."""
    num_bytes: npt.NDArray[np.int64]
    """int64 (n,) bytes of the same images."""
    formats: Counter[str]
    """The same images by their members' extension."""
    characters: npt.NDArray[np.int64]
    """int64 (m,) characters of each caption."""
    words: npt.NDArray[np.int64]
    """int64 (m,) words of each caption."""
    samples: int
    """Samples, those without a size or caption included."""


@dataclass(frozen=True)
class Stats:
    """Sizes, aspect ratios, tokens, bytes and caption lengths of shards or a size list."""

    shards: Shards = ()
    """Tar shards: files, folders, brace ranges, glob patterns, URLs."""
    sizes: Path | None = None
    """A size list instead: .tsv or .csv with height and width (and bytes), or a .npy of shape
    (n, 2)."""
    laion: int = 0
    """So many images drawn from the fit to LAION-400M's sizes instead."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    budgets: tuple[int, ...] = (256, 1024)
    """Token budgets for which the share of images above them is shown."""
    workers: int | None = None
    """Processes that read shards; None takes all cores where there is much to read."""
    out: Path = Path("runs/packer/stats.png")
    """Where the picture goes."""

    def __post_init__(self) -> None:
        if bool(self.shards) + (self.sizes is not None) + bool(self.laion) != 1:
            raise ValueError(
                "stats reads shards, a size list (--sizes) or drawn sizes (--laion N); give one."
            )
        if self.patch_size < 1 or self.laion < 0:
            raise ValueError(
                "patch_size must be at least 1 and laion not negative; got "
                f"{self.patch_size} and {self.laion}."
            )

    def run(self) -> int:
        """Print the quantiles and draw the histograms."""
        from packer.tools.plots import draw_stats  # matplotlib takes a second

        title, found = self._read()
        if not len(found.sizes):
            raise ValueError(f"stats needs images with a size; found none in {title}.")
        columns = self._columns(found)
        print(title)
        print("\n" + quantiles_text(columns))
        print("\n" + self._notes(found, columns))
        named = {f"{name} ({unit})" if unit else name: v for (name, unit), v in columns.items()}
        picture = draw_stats(
            named, found.sizes, self.out, title=title, linear=("words of a caption",)
        )
        print(f"\npicture: {picture}")
        return 0

    def _read(self) -> tuple[str, ShardStats]:
        none = np.empty(0, np.int64)
        if self.shards:
            shards = expand_shards(self.shards)
            parts = list(map_shards(shard_stats, shards, workers=self.workers, what="Reading"))
            found = ShardStats(
                sizes=np.concatenate([part.sizes for part in parts]),
                num_bytes=np.concatenate([part.num_bytes for part in parts]),
                formats=sum((part.formats for part in parts), Counter()),
                characters=np.concatenate([part.characters for part in parts]),
                words=np.concatenate([part.words for part in parts]),
                samples=sum(part.samples for part in parts),
            )
            return f"{found.samples:,} samples in {len(shards):,} shard(s)", found
        if self.sizes is not None:
            listed = read_size_list(self.sizes)
            num_bytes = none if listed.num_bytes is None else listed.num_bytes
            sizes, title = listed.sizes, f"{len(listed.sizes):,} images of {self.sizes.name}"
        else:
            sizes, num_bytes = laion_sizes(self.laion).astype(np.int64), none
            title = f"{self.laion:,} images of the LAION-400M fit"
        return title, ShardStats(sizes, num_bytes, Counter(), none, none, len(sizes))

    def _columns(self, found: ShardStats) -> dict[tuple[str, str], Values]:
        heights, widths = found.sizes.T
        rows, cols = plan_resize_many(
            heights, widths, patch_size=self.patch_size, max_tokens=np.iinfo(np.int32).max
        )
        return {
            ("short side", "pixels"): found.sizes.min(axis=1),
            ("long side", "pixels"): found.sizes.max(axis=1),
            ("width / height", ""): widths / heights,
            (f"tokens at patch {self.patch_size}", ""): rows * cols,
            ("encoded image", "bytes"): found.num_bytes,
            ("characters of a caption", ""): found.characters,
            ("words of a caption", ""): found.words,
        }

    def _notes(self, found: ShardStats, columns: dict[tuple[str, str], Values]) -> str:
        tokens = columns[f"tokens at patch {self.patch_size}", ""]
        over = [f"{100 * float((tokens > b).mean()):.1f} % above {b:,}" for b in self.budgets]
        lines = [f"tokens: {tokens.sum():,} in all" + "".join(f", {text}" for text in over)]
        if found.formats:
            named = (f"{name} {count:,}" for name, count in found.formats.most_common())
            lines.append(f"formats: {', '.join(named)}")
        lost = found.samples - len(found.sizes)
        without = found.samples - len(found.characters)
        if self.shards and (lost or without):
            lines.append(
                f"{lost:,} samples have no image whose size can be read, {without:,} no caption: "
                "`python -m packer check` says which"
            )
        return "\n".join(lines)


def shard_stats(shard: str) -> ShardStats:
    """Read sizes, bytes and captions of a shard's samples; no image is decoded."""
    config = PackerConfig()
    sizes, num_bytes, characters, words = [], [], [], []
    formats, samples = Counter[str](), 0
    for raw in iter_shard(shard, on_problem=lambda cause, detail: None):
        samples += 1
        extension = image_extension(raw.members)
        header = read_header(None if extension is None else raw.members[extension])
        if extension is not None and not isinstance(header, SkipSample):
            sizes.append(header.size)
            num_bytes.append(len(raw.members[extension]))
            formats[extension] += 1
        if "txt" in raw.members:
            caption = sample_from_raw(raw, config=config).get("caption") if extension else ""
            if caption:
                characters.append(len(caption))
                words.append(len(caption.split()))
    return ShardStats(
        np.array(sizes, np.int64).reshape(-1, 2),
        np.array(num_bytes, np.int64),
        formats,
        np.array(characters, np.int64),
        np.array(words, np.int64),
        samples,
    )


def quantiles_text(columns: dict[tuple[str, str], Values]) -> str:
    """Lay out the quantiles of each quantity; empty ones are left out."""
    head = ["", "min", "1 %", "10 %", "median", "90 %", "99 %", "max", "mean"]
    rows = []
    for (name, unit), values in columns.items():
        if len(values):
            numbers = [*np.quantile(values, _QUANTILES), values.mean()]
            rows.append([f"{name}, {unit}" if unit else name, *map(_number, numbers)])
    return format_table(head, rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
