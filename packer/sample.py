"""What people hand in -> `Sample`: one form of key, image, caption and label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from packer.decode import image_crc
from packer.errors import SkipSample

Label = int | tuple[float, ...]
"""A class index, or one target per class."""


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


def as_sample(value: Any) -> Sample:
    """Read one item of a dataset.

    Args:
        value: A `Sample`; a mapping with ``image`` and any of ``caption`` (a string or several),
            ``label`` (int or float vector) and ``key``; or a pair (image, caption | label).

    Returns:
        The sample; without a key it is the CRC-32 of the image's bytes or pixels.

    Raises:
        SkipSample: ``missing_image`` for None (what many datasets return for a broken item) or a
            mapping whose image is None.
        ValueError: For anything else.
    """
    if isinstance(value, Sample):
        return value
    if value is None:
        raise SkipSample("missing_image", "the dataset returned None")
    if isinstance(value, Mapping):
        if "image" not in value:
            raise ValueError(
                f"a sample must have an 'image'; got the keys {sorted(map(str, value))}. Rename "
                "the image column to 'image'."
            )
        image, caption, label = value["image"], value.get("caption"), value.get("label")
        key = value.get("key")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 2:
        image, second = value
        key = None
        caption, label = (second, None) if _is_caption(second) else (None, second)
    else:
        raise ValueError(
            "a sample must be a mapping with 'image' (and 'caption', 'label', 'key') or a pair "
            f"(image, caption | label); got {type(value).__name__}."
        )
    if image is None:
        raise SkipSample("missing_image", "the sample's image is None")
    return Sample(
        key=str(key) if key is not None else image_crc(image),
        image=image,
        captions=_as_captions(caption),
        label=_as_label(label),
    )


def _is_caption(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )


def _as_captions(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and not value:
        return None  # several captions, of which there are none
    if not _is_caption(value):
        raise ValueError(f"a caption must be a string or a list of strings; got {value!r}.")
    return (value,) if isinstance(value, str) else tuple(value)


def _as_label(value: Any) -> Label | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, list | tuple) and value and all(isinstance(v, int | float) for v in value):
        return tuple(float(v) for v in value)
    raise ValueError(f"a label must be an int or a vector of floats; got {value!r}.")
