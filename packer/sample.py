"""What people hand in -> `Sample`: one form of key, image, caption and label."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packer.decode import image_crc
from packer.errors import SkipSample
from packer.shards import IMAGE_EXTENSIONS, class_index

Label = int | tuple[float, ...]
"""A class index, or one target per class."""

# What each part is called: by us, by Hugging Face data sets, as a member of a webdataset sample.
# Nothing wider: a column that is taken for what it is not trains a model on the wrong thing.
_PARTS = {
    "image": "image",
    **dict.fromkeys(IMAGE_EXTENSIONS, "image"),
    **dict.fromkeys(("caption", "text", "txt"), "caption"),
    **dict.fromkeys(("label", "cls"), "label"),
    **dict.fromkeys(("key", "__key__"), "key"),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with what belongs to it."""

    key: str
    image: Any
    """Encoded bytes, PIL image, or uint8 (H, W, 3) array or tensor."""
    captions: tuple[str, ...] | None = None
    """Its captions, of which one is drawn by key; None where the data has no captions."""
    label: Label | None = None

    def caption(self, draw: int) -> str | None:
        """Return the caption a 64-bit draw selects."""
        return self.captions[draw % len(self.captions)] if self.captions else None


def as_sample(value: Any, *, key: str | None = None, max_pixels: int | None = None) -> Sample:
    """Read one item of a dataset.

    Args:
        value: A `Sample`; a pair (image, caption | label), as torchvision's data sets give; or a
            mapping with an image and any of caption, label and key. These are called ``image``,
            ``caption`` or ``text``, ``label`` and ``key``; in a webdataset sample ``jpg`` (``png``,
            ...), ``txt``, ``cls`` and ``__key__``. Other entries are ignored.

            An image is a PIL image, a uint8 (H, W, 3) or (H, W) array or tensor, encoded bytes, the
            `pathlib.Path` of a file, or what Hugging Face's ``Image(decode=False)`` gives: a
            mapping of ``bytes`` and ``path``, of which the bytes are used where they are there. A
            caption is a string or several, a label an int or a vector of floats. Members ``txt``
            and ``cls`` may still be bytes; text that is not UTF-8 is decoded with replacement.
        key: The key of an item that has none.
        max_pixels: Largest pixel count of a PIL image that is decoded for its CRC; None sets no
            limit.

    Returns:
        The sample, files read. Without any key it is the CRC-32 of the image's bytes or pixels.

    Raises:
        SkipSample: ``missing_image`` for None (what many datasets return for a broken item), an
            image that is None, or a file that cannot be read; ``bad_label`` for a ``cls`` in bytes
            that holds no integer; where the CRC needs it, ``decode_error`` or ``too_many_pixels``.
        ValueError: For anything else, and where two names of one thing disagree.
    """
    if isinstance(value, Sample):
        return value
    if value is None:
        raise SkipSample("missing_image", "the dataset returned None")
    caption: tuple[str, ...] | None
    label: Label | None
    if isinstance(value, Mapping):
        parts = _parts_of(value)
        image = _only_image(parts["image"])
        caption = _agreed(parts.get("caption"), _as_captions)
        label = _agreed(parts.get("label"), _as_label)
        own = _agreed(parts.get("key"), _as_key)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 2:
        image, second = value
        own = None
        if _is_caption(second):
            caption, label = _as_captions("caption", second), None
        else:
            caption, label = None, _as_label("label", second)
    else:
        raise ValueError(
            "a sample must be a mapping with 'image' (and 'caption', 'label', 'key') or a pair "
            f"(image, caption | label); got {type(value).__name__}."
        )
    image = _as_image(image)
    own = key if own is None else own
    if own is None:
        own = image_crc(image, max_pixels=max_pixels)
    return Sample(own, image, caption, label)


def _parts_of(value: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Sort a mapping's entries by what they are; others are not looked at, rows may be lazy.

    Tables of webdataset samples have a column for every member, most of them None: these are left
    out, but where there is a column for the image the sample is one.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name in value:
        part = _PARTS.get(name)
        if part is not None:
            named = parts.setdefault(part, {})
            entry = value[name]
            if entry is not None:
                named[name] = entry
    if "image" not in parts:
        raise ValueError(
            f"a sample must have an 'image'; got the keys {sorted(map(str, value))}. Rename "
            "the image column to 'image'."
        )
    return parts


# Images


def _only_image(found: dict[str, Any]) -> Any:
    if len(found) > 1:
        names = ", ".join(map(repr, found))
        raise ValueError(f"a sample must have one image; got {names}. Remove all but one.")
    return next(iter(found.values()), None)


def _as_image(image: Any) -> Any:
    """Read what only names the image; leave every other form to the decoder."""
    if isinstance(image, Mapping):
        image = _stored_image(image)
    if image is None:
        raise SkipSample("missing_image", "the sample's image is None")
    if isinstance(image, str):
        raise ValueError(
            f"an image must not be a string, which may be anything; got {image[:80]!r}. If it is "
            "the path of a file, give pathlib.Path(...)."
        )
    return _read_file(image) if isinstance(image, Path) else image


def _stored_image(image: Mapping[Any, Any]) -> Any:
    """Return the bytes of Hugging Face's undecoded form, or the path where it has none."""
    if not image or not set(image) <= {"bytes", "path"}:
        raise ValueError(
            "an image that is a mapping must have 'bytes' or 'path' and nothing else, as Hugging "
            f"Face's Image(decode=False) gives; got the keys {sorted(map(str, image))}."
        )
    if image.get("bytes") is not None:
        return image["bytes"]
    path = image.get("path")
    if path is not None and not isinstance(path, str | Path):
        raise ValueError(f"an image's 'path' must be a string; got {path!r}.")
    return None if path is None else Path(path)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SkipSample("missing_image", f"{path}: {error.strerror or error}") from error


# Captions, labels and keys


def _agreed(entries: dict[str, Any] | None, convert: Callable[[str, Any], Hashable]) -> Any:
    """Convert what a sample has of one kind, under one name or several that must agree."""
    if not entries:
        return None
    if len(entries) == 1:  # nearly always, and this runs for every sample
        return convert(*next(iter(entries.items())))
    found = {name: convert(name, entry) for name, entry in entries.items()}
    values = {part for part in found.values() if part is not None}
    if len(values) > 1:
        shown = ", ".join(f"{name!r}: {part!r}" for name, part in found.items())
        raise ValueError(
            f"{' and '.join(map(repr, found))} must be the same where a sample has both; got "
            f"{shown}. Remove what is not meant."
        )
    return next(iter(values), None)


def _is_caption(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        return True
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )


def _as_key(name: str, value: Any) -> str:
    return str(value)


def _as_captions(name: str, value: Any) -> tuple[str, ...] | None:
    if isinstance(value, bytes) and name == "txt":
        value = value.decode("utf-8-sig", "replace").strip()  # as a stream reads it
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and not value:
        return None  # several captions, of which there are none
    if not _is_caption(value):
        raise ValueError(f"a caption must be a string or a list of strings; got {value!r}.")
    return (str(value),) if isinstance(value, str) else tuple(map(str, value))


def _as_label(name: str, value: Any) -> Label | None:
    if value is None:
        return None
    if isinstance(value, bytes) and name == "cls":
        return class_index(value)
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, list | tuple) and value:
        # A list may hold numpy scalars; np.float64 is a float already, np.float32 is not.
        values = [v.item() if isinstance(v, np.generic) else v for v in value]
        if all(isinstance(v, int | float) for v in values):
            return tuple(float(v) for v in values)
    raise ValueError(f"a label must be an int or a vector of floats; got {value!r}.")
