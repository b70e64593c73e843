"""`ImageFolder`: labelled images in one folder a class, as a map-style data set of known sizes."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from packer.decode import read_size
from packer.errors import SkipSample
from packer.shards import IMAGE_EXTENSIONS

logger = logging.getLogger("packer")


@dataclass(frozen=True)
class ImageFolder:
    """Files below ``root/<class name>/``, in sorted order; the class is the label.

    Item i is a mapping of ``image`` (the bytes), ``label`` and ``key``, the path below ``root``.
    """

    root: Path
    """The folder."""
    classes: tuple[str, ...]
    """Names of the subfolders; a name's place is its label."""
    files: tuple[tuple[str, int], ...]
    """(path below `root`, label) of each image."""

    @classmethod
    def read(cls, root: str | Path, classes: Sequence[str] | None = None) -> "ImageFolder":
        """List a folder's images.

        Args:
            root: The folder.
            classes: Names of the classes, in the order of their labels; None takes the subfolders,
                sorted.

        Raises:
            ValueError: If there is no image, or a subfolder is none of the classes given.
        """
        root = Path(root)
        found = sorted(path.name for path in root.iterdir() if path.is_dir())
        found = [name for name in found if not name.startswith(".")]
        names = tuple(found if classes is None else classes)
        unknown = sorted(set(found) - set(names))
        if unknown:
            raise ValueError(
                f"the subfolders of {root} must be the classes {_few(names)}; got {_few(unknown)} "
                "beside. Use the class names of training."
            )
        files = tuple(
            (path.relative_to(root).as_posix(), label)
            for label, name in enumerate(names)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
        )
        if not files:
            raise ValueError(
                f"{root} must hold images in one subfolder a class ({root}/<class>/<image>); it "
                f"holds none ending in {', '.join(IMAGE_EXTENSIONS)}."
            )
        return cls(root, names, files)

    @classmethod
    def unlabelled(cls, root: str | Path) -> "ImageFolder":
        """List the images below a folder, whatever its subfolders are: all are of one class.

        Raises:
            ValueError: If there is no image.
        """
        root = Path(root)
        files = tuple(
            (path.relative_to(root).as_posix(), 0)
            for path in sorted(root.rglob("*"))
            if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
        )
        if not files:
            raise ValueError(
                f"{root} must hold images; it holds none ending in {', '.join(IMAGE_EXTENSIONS)}."
            )
        return cls(root, ("",), files)

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of each image, its path below `root`."""
        return tuple(path for path, _ in self.files)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one image's bytes."""
        path, label = self.files[index]
        return {"key": path, "image": self.root / path, "label": label}

    def with_sizes(
        self, *, max_pixels: int = 178_000_000, progress: bool = True
    ) -> tuple["ImageFolder", npt.NDArray[np.int64], dict[str, int]]:
        """Read every image's size from its header.

        Args:
            max_pixels: Larger images are left out.
            progress: Whether to show a progress bar.

        Returns:
            The folder without the files that cannot be used; int64 (n, 2) heights and widths of the
            rest, after EXIF orientation; and how many were left out by cause.
        """
        kept: list[tuple[str, int]] = []
        sizes: list[tuple[int, int]] = []
        skipped: Counter[str] = Counter()
        bar = tqdm(self.files, desc=f"sizes of {self.root.name}", unit="image", leave=False)
        bar.disable = not progress
        for path, label in bar:
            try:
                info = read_size((self.root / path).read_bytes(), max_pixels=max_pixels)
            except SkipSample as error:
                skipped[error.cause] += 1
                logger.warning("skipped %s: %s: %s", path, error.cause, error.detail)
            except OSError as error:
                skipped["missing_image"] += 1
                logger.warning("skipped %s: missing_image: %s", path, error)
            else:
                kept.append((path, label))
                sizes.append((info.size.height, info.size.width))
        folder = ImageFolder(self.root, self.classes, tuple(kept))
        return folder, np.array(sizes, np.int64).reshape(-1, 2), dict(skipped)


def is_flat_folder(path: str | Path) -> bool:
    """Whether a path is a folder with images right in it and without tar shards."""
    path = Path(path)
    return (
        path.is_dir()
        and not any(path.glob("*.tar"))
        and any(
            item.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS for item in path.iterdir()
        )
    )


def is_image_folder(path: str | Path) -> bool:
    """Whether a path is a folder with subfolders and without tar shards."""
    path = Path(path)
    return (
        path.is_dir()
        and not any(path.glob("*.tar"))
        and any(item.is_dir() and not item.name.startswith(".") for item in path.iterdir())
    )


def _few(names: Sequence[str], count: int = 5) -> str:
    shown = ", ".join(map(repr, names[:count]))
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown
