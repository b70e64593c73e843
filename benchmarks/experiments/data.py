"""Data sets of the experiments, and copies of them squashed to squares."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

from PIL import Image
from tqdm import tqdm

from benchmarks.experiments.arms import Scale
from navit.train.setup import TOKENIZER_CAPTIONS
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.decode import decode_rgb, read_size
from packer.demo import ensure_demo
from packer.errors import SkipSample
from packer.patchify import resize_uint8
from packer.shards import expand_shards, iter_shard, sample_from_raw, write_shards

DEMO_SCALE = 5.4
"""Of the drawn scenes: their sides are then at least 259 px."""
PHOTOS = Path(__file__).parents[2].parent / "shared" / "data"
"""4,340 real pairs beside the repository, where they are there."""
RETRIEVAL = "text_to_image/recall@1"
SQUARE_SHARD = 500


@dataclass(frozen=True)
class DataSet:
    """Image-text pairs with how they are trained on."""

    name: str
    """Short; part of folders' names."""
    train: tuple[str, ...]
    """Training shards."""
    val: tuple[str, ...]
    """Validation shards."""
    folder: Path
    """Where its tokenizer and its squares lie."""
    scale: Scale
    """Patch size and augmentation."""
    metric: str = RETRIEVAL
    """What "quality" is."""

    def tokenizer(self) -> Path:
        """Return the tokenizer all runs share, trained on the captions at the first call."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            captions = [
                sample["caption"]
                for sample in _samples(self.train, self.scale.patch_size)
                if "caption" in sample
            ]
            trained = CaptionTokenizer.train(captions[:TOKENIZER_CAPTIONS])
            part = path.with_suffix(".part")
            trained.save(part)
            os.replace(part, path)
        return path

    def squashed(self, side: int, *, progress: bool = True) -> "DataSet":
        """Return the same pairs with every image squashed to ``side`` x ``side`` patches.

        Shrinking is done by the kernel that training uses, and the result is kept without loss: the
        pixels are those that a square resize in the loader would give. Their JSON is unchanged, so
        that the shape-only baseline still knows the native sizes.
        """
        target = self.folder / f"square-{side}"
        marker = target / "done.json"
        sources = {"train": self.train, "val": self.val}
        stamp = {part: _identity(shards) for part, shards in sources.items()}
        pixels = side * self.scale.patch_size
        stamp["pixels"] = [str(pixels)]
        if not marker.exists() or json.loads(marker.read_text()) != stamp:
            marker.unlink(missing_ok=True)
            for old in target.glob("*.tar"):
                old.unlink()
            for part, shards in sources.items():
                squares = tqdm(
                    _squares(shards, pixels, self.scale.patch_size),
                    desc=f"{self.name} {part}, {pixels} px squares",
                    unit="image",
                    disable=not progress,
                )
                write_shards(
                    iter(squares), target / f"{part}-%05d.tar", samples_per_shard=SQUARE_SHARD
                )
            marker.write_text(json.dumps(stamp))
        found = {part: tuple(sorted(map(str, target.glob(f"{part}-*.tar")))) for part in sources}
        return DataSet(
            self.name, found["train"], found["val"], self.folder, self.scale, self.metric
        )


def data_sets(
    folder: Path, *, shards: Sequence[str] = (), val: Sequence[str] = (), quick: bool = False
) -> dict[str, DataSet]:
    """Return the data sets there are, drawing the scenes at the first call.

    Args:
        folder: Where what is made is kept.
        shards: Training shards that take the place of the photographs beside the repository.
        val: Their validation shards.
        quick: A few scenes and tiny towers.
    """
    tiny: dict[str, Any] = {"seq_len": 100, "sequences": 2, "tiny": True} if quick else {}
    counts: dict[str, Any] = (
        {"num_train": 60, "num_val": 12} if quick else {"num_train": 4000, "num_val": 500}
    )
    drawn = folder / ("demo-quick" if quick else "demo")
    demo = ensure_demo(drawn / "scenes", scale=DEMO_SCALE, **counts)
    train, held = (tuple(map(str, paths)) for paths in (demo.train, demo.val))
    found = [DataSet("demo", train, held, drawn, Scale(16, **tiny))]
    if shards:
        own = tuple(expand_shards(list(shards))), tuple(expand_shards(list(val)))
        # Other shards have another tokenizer and other squares.
        name = f"own-{crc32(repr([_identity(part) for part in own]).encode()):08x}"
        found.append(DataSet("own", *own, folder / name, Scale(16, real=True, **tiny)))
    elif PHOTOS.is_dir():
        train = tuple(map(str, sorted(PHOTOS.glob("pairs-train-*.tar"))))
        held = (str(PHOTOS / "pairs-val-00000.tar"),)
        # The photographs' longest side is 190 px: 10 patches of 16 would enlarge most of them.
        scale = Scale(8, real=True, **tiny)
        metric = "caltech101/prompt_accuracy@1"
        found.append(DataSet("pairs", train, held, folder / "pairs", scale, metric))
    return {data.name: data for data in found}


def _samples(shards: Sequence[str], patch_size: int) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for raw in iter_shard(shard, on_problem=lambda cause, detail: None):
            try:
                sample = sample_from_raw(raw, config=PackerConfig(patch_size=patch_size))
            except SkipSample:
                continue
            described = raw.members.get("json")
            yield {**sample, "json": None if described is None else json.loads(described)}


def _squares(shards: Sequence[str], pixels: int, patch_size: int) -> Iterator[dict[str, Any]]:
    for index, sample in enumerate(_samples(shards, patch_size)):
        try:
            info = read_size(sample["image"])
            native = decode_rgb(sample["image"], info, grid_pixels=(pixels, pixels))
        except SkipSample:
            continue
        out = BytesIO()
        square = resize_uint8(native, pixels, pixels).numpy()
        Image.fromarray(square).save(out, "PNG", compress_level=1)
        yield {**sample, "key": f"{index:06d}", "image": out.getvalue()}


def _identity(shards: Sequence[str]) -> list[str]:
    missing = [path for path in shards if not Path(path).is_file()]
    if missing:
        raise ValueError(
            "shards must be local files here, as squashed copies are made of them; got "
            f"{missing[0]}. Download them first."
        )
    return [f"{Path(path).name} {Path(path).stat().st_size}" for path in shards]
