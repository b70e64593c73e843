"""Which class each image is of, by set: from labels, or from the class names in the json."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from navit.evaluate.prompts import class_label

LABEL_SET = "cls"
"""What the set of the images with a label of their own (``.cls``, a folder's) is called."""

Metadata = Mapping[str, Mapping[str, Any]]


class Members(NamedTuple):
    """The images of one set."""

    rows: Int64[Tensor, " n"]
    """Which images they are."""
    classes: Int64[Tensor, " n"]
    """Class of each, from 0."""


class ClassNumbers:
    """Numbers the classes of every set alike in training and validation images.

    Labels are numbers already. Names in the json are numbered in their sorted order, those of all
    metadata together.

    Args:
        metadata: Json of the samples by key, of each part of the data.
    """

    def __init__(self, *metadata: Metadata) -> None:
        names: dict[str, set[str]] = defaultdict(set)
        for part in metadata:
            for fields in part.values():
                if (label := class_label(fields)) is not None:
                    names[label[0]].add(label[1])
        self.numbers = {
            set_name: {name: number for number, name in enumerate(sorted(found))}
            for set_name, found in sorted(names.items())
        }
        """Number of each name, by set."""

    def members(
        self, keys: Sequence[str], labels: Int64[Tensor, " N"], metadata: Metadata
    ) -> dict[str, Members]:
        """Sort images into sets.

        Args:
            keys: Key of each image.
            labels: Label of each image; a negative one is none.
            metadata: Json of the samples by key. Where an image has a label, it counts, and the
                class named in its json does not.

        Returns:
            The images of each set that has any, sets in the order of their names.
        """
        rows: dict[str, list[int]] = defaultdict(list)
        classes: dict[str, list[int]] = defaultdict(list)
        for row, (key, own) in enumerate(zip(keys, labels.tolist(), strict=True)):
            if own >= 0:
                rows[LABEL_SET].append(row)
                classes[LABEL_SET].append(own)
            elif (label := class_label(metadata.get(key, {}))) is not None:
                rows[label[0]].append(row)
                classes[label[0]].append(self.numbers[label[0]][label[1]])
        return {
            name: Members(torch.tensor(rows[name]), torch.tensor(classes[name]))
            for name in sorted(rows)
        }
