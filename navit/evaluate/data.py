"""What is evaluated on: tar shards, a folder a class, or a data set laid out by CLIP_benchmark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from navit.evaluate.classify import folder_pass
from navit.evaluate.encode import read_metadata
from navit.evaluate.run import evaluation_packing
from packer.batch import PackedBatch
from packer.config import PackerConfig
from packer.folder import ImageFolder, is_image_folder
from packer.shards import expand_shards, image_extension, iter_shard
from packer.source import is_remote
from packer.stream import PackedStream

SHARD_COUNT = "nshards.txt"
CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"

Kind = Literal["auto", "pairs", "classes"]
CaptionForm = Literal["auto", "lines", "whole"]

_FIELDS = (
    *("set", "class_name", "captions", "caption"),
    *("width", "height", "orig_width", "orig_height"),
)


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of them beside their captions and labels."""

    shards: tuple[str, ...]
    """Tar shards; empty for a folder."""
    labelled: bool
    """Whether a sample needs a label, and not a caption."""
    caption_lines: bool = False
    """Whether every line of a caption is a caption of its own."""
    folder: ImageFolder | None = None
    """A folder with one subfolder a class."""
    class_names: tuple[str, ...] | None = None
    """Names of the labels, in their order; None where they are not known."""
    templates: tuple[str, ...] | None = None
    """Prompts of the data set; None where it has none."""

    def batches(
        self, packing: PackerConfig, sequences_per_batch: int, *, workers: int = 0
    ) -> Iterable[PackedBatch]:
        """Return one pass over the images: whole, with every token, within the budget.

        Args:
            packing: Packing of the model; cropping, dropping and resolution sampling are off.
            sequences_per_batch: B.
            workers: Processes that read and decode; a folder is read in this one.
        """
        packing = evaluation_packing(packing)
        if self.folder is not None:
            return folder_pass(self.folder, packing, sequences_per_batch)
        if self.labelled:  # captions are then welcome, not needed
            packing = replace(packing, missing_caption="keep")
        stream = PackedStream(
            self.shards,
            packing,
            sequences_per_batch=sequences_per_batch,
            need="label" if self.labelled else "caption",
            epochs=1,
            shuffle_shards=False,
            rank=0,  # all images, also where this is one rank of a training run
            world_size=1,
        )
        if not workers:
            return stream
        return DataLoader(stream, batch_size=None, num_workers=workers)

    def metadata(self) -> dict[str, dict[str, Any]]:
        """Read what is used of the samples' json; of URLs and commands nothing."""
        return read_metadata([path for path in self.shards if not is_remote(path)], keep=_FIELDS)

    def without(self, other: "ImageSet") -> "ImageSet":
        """Leave out the shards that are also in another set.

        Raises:
            ValueError: If none is left.
        """
        taken = {_identity(path) for path in other.shards}
        left = tuple(path for path in self.shards if _identity(path) not in taken)
        same_folder = self.folder is not None and other.folder is not None
        if (self.shards and not left) or (
            same_folder and self.folder.root.resolve() == other.folder.root.resolve()  # type: ignore[union-attr]  # narrowed by same_folder
        ):
            raise ValueError(
                "the training images must be others than the validation images; all of them are "
                "the same. Name other shards with --train-shards."
            )
        return replace(self, shards=left)

    def describe(self) -> dict[str, Any]:
        """Say what it is, JSON-ready."""
        where = list(self.shards) if self.folder is None else [str(self.folder.root)]
        return {
            "where": where,
            "labelled": self.labelled,
            "caption_lines": self.caption_lines,
            "class_names": None if self.class_names is None else len(self.class_names),
        }


def read_image_set(
    given: Sequence[str | Path],
    *,
    split: str = "test",
    kind: Kind = "auto",
    captions: CaptionForm = "auto",
    classes: Sequence[str] | None = None,
) -> ImageSet:
    """Find out what the images are.

    Args:
        given: Tar shards as `packer.shards.expand_shards` takes them; or one folder: with one
            subfolder a class, or in the layout CLIP_benchmark exports and reads: shards in
            ``<root>/<split>/{0..n}.tar``, their number in ``<root>/<split>/nshards.txt``, and in
            ``<root>`` any of ``classnames.txt``, ``zeroshot_classification_templates.txt`` (one a
            line) and ``dataset_type.txt`` (``classification`` or ``retrieval``).
        split: Split of such a data set where its root is given.
        kind: "pairs": a caption each, with classes in the json where there are any; "classes": a
            ``.cls`` each; "auto": what the layout or else the first sample says.
        captions: "lines": each line of a ``.txt`` is a caption of its own; "whole": the whole text
            is one; "auto": lines in a retrieval set of CLIP_benchmark, whole elsewhere.
        classes: Names of a folder's classes, in the order of their labels; None: its subfolders,
            sorted.

    Raises:
        ValueError: If shards are missing, there is no such split, or its type is another.

    Source: the layout is that of LAION-AI/CLIP_benchmark, "Webdatasets" in its README.
    """
    root, folder = _layout(given, split)
    if folder is not None:
        return _layout_set(root, folder, kind, captions)
    if len(given) == 1 and is_image_folder(given[0]):
        images = ImageFolder.read(given[0], classes)
        return ImageSet((), labelled=True, folder=images, class_names=images.classes)
    shards = tuple(expand_shards(list(given)))
    labelled = kind == "classes" or (kind == "auto" and _first_is_labelled(shards))
    return ImageSet(shards, labelled, caption_lines=captions == "lines")


def read_lines(path: Path, what: str) -> tuple[str, ...]:
    """Read one entry a line, white space around it removed.

    Args:
        path: The file.
        what: What an entry is, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no entry, or a blank line between entries: a name's line is its
            label.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or "" in lines:
        found = "none" if not lines else f"line {lines.index('') + 1} blank"
        raise ValueError(f"{path} must hold one {what} a line; got {found}.")
    return tuple(lines)


def _layout(given: Sequence[str | Path], split: str) -> tuple[Path, Path | None]:
    """Return root and split folder where the one path given is in CLIP_benchmark's layout."""
    path = Path(given[0]) if len(given) == 1 else Path()
    if len(given) != 1 or not path.is_dir():
        return path, None
    if (path / SHARD_COUNT).is_file():
        return path.resolve().parent, path
    found = sorted(item.parent.name for item in path.glob(f"*/{SHARD_COUNT}"))
    if found and split not in found:
        raise ValueError(
            f"the split must be one that {path} holds, {found}; got {split!r}. Name one of them."
        )
    return path, path / split if found else None


def _layout_set(root: Path, folder: Path, kind: Kind, captions: CaptionForm) -> ImageSet:
    count = (folder / SHARD_COUNT).read_text().strip()
    if not count.isdecimal() or not int(count):
        raise ValueError(
            f"{folder / SHARD_COUNT} must hold the number of shards, 1 or more; got {count!r}."
        )
    shards = tuple(expand_shards([folder / f"{number}.tar" for number in range(int(count))]))
    described = root / DATASET_TYPE
    stated = described.read_text().strip().lower() if described.is_file() else "classification"
    if stated not in ("classification", "retrieval"):
        raise ValueError(
            f"{described} must say classification or retrieval; got {stated!r}, which is not "
            "evaluated."
        )
    retrieval = stated == "retrieval"
    labelled = kind == "classes" or (kind == "auto" and not retrieval)
    names, prompts = root / CLASS_NAMES, root / TEMPLATES
    return ImageSet(
        shards,
        labelled,
        caption_lines=captions == "lines" or (captions == "auto" and retrieval),
        class_names=read_lines(names, "class name") if names.is_file() else None,
        templates=read_lines(prompts, "template") if prompts.is_file() else None,
    )


def _first_is_labelled(shards: Sequence[str]) -> bool:
    """Whether the first sample with an image has a label and no caption."""
    for path in shards:
        for raw in iter_shard(path, on_problem=lambda cause, detail: None):
            if image_extension(raw.members) is not None:
                return "cls" in raw.members and "txt" not in raw.members
    return False


def _identity(path: str) -> str:
    return path if is_remote(path) else str(Path(path).resolve())
