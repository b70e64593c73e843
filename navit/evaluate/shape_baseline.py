"""What the shape of an image alone gives away: nearest neighbours on native width and height.

A model that sees native aspect ratios can read part of the class from the shape. This baseline
sees nothing else; a result beside it shows how much came from the pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from navit.evaluate.prompts import class_label

Metadata = Mapping[str, Mapping[str, Any]]
"""Json of the samples by key, as `navit.evaluate.encode.read_metadata` gives it."""


def shape_baselines(train: Metadata, val: Metadata, *, k: int = 20) -> dict[str, float]:
    """Shape-only accuracy of every `set` with class names in both parts.

    Args:
        train: Metadata of the training samples.
        val: Metadata of the validation samples.
        k: Number of neighbours that vote.

    Returns:
        ``"<set>/shape_accuracy@1"``, in [0, 1].

    Raises:
        ValueError: If `k` is not positive.
    """
    names = {label[0] for fields in val.values() if (label := class_label(fields)) is not None}
    found = {name: shape_baseline_accuracy(train, val, name, k=k) for name in sorted(names)}
    return {f"{name}/shape_accuracy@1": value for name, value in found.items() if value is not None}


def shape_baseline_accuracy(
    train: Metadata, val: Metadata, set_name: str, *, k: int = 20
) -> float | None:
    """Accuracy of k nearest neighbours on (log width, log height), with no pixel read.

    Args:
        train: Metadata of the training samples. Keys that are also in `val` are left out.
        val: Metadata of the validation samples.
        set_name: The `set` whose classes are told apart.
        k: Number of neighbours that vote.

    Returns:
        Share of the validation images whose class wins the vote, in [0, 1]; None where one of
        the parts has no sample with a class and a size. Sizes are `orig_width` and
        `orig_height`, or `width` and `height` where the first are absent.

    Raises:
        ValueError: If `k` is not positive.
    """
    if k < 1:
        raise ValueError(f"k must be positive; got {k}.")
    known = {key: fields for key, fields in train.items() if key not in val}
    train_sizes, train_names = _sizes_and_names(known, set_name)
    val_sizes, val_names = _sizes_and_names(val, set_name)
    if not train_names or not val_names:
        return None
    classes = sorted(set(train_names))
    index = {name: number for number, name in enumerate(classes)}
    train_classes = np.array([index[name] for name in train_names], dtype=np.int64)
    predicted = nearest_vote(train_sizes, train_classes, val_sizes, k=k)
    hits = [classes[number] == name for number, name in zip(predicted, val_names, strict=True)]
    return float(sum(hits) / len(hits))


def nearest_vote(
    points: Float64[np.ndarray, "N 2"],
    classes: Int64[np.ndarray, " N"],
    queries: Float64[np.ndarray, "Q 2"],
    *,
    k: int,
) -> Int64[np.ndarray, " Q"]:
    """Predict the class most of the k nearest points have, whatever the order of the points.

    Native sizes repeat, so many points lie equally far: all those as near as the k-th vote. Equal
    votes go to the class with more points, then to the smaller class number.

    Args:
        points: Known points, at least one.
        classes: Their classes, from 0.
        queries: Points to classify.
        k: Number of neighbours; at most all points vote.

    Returns:
        One class per query.
    """
    one_hot = np.eye(int(classes.max()) + 1)[classes]
    share = one_hot.sum(0) / (len(classes) + 1)  # below 1: decides between equal votes alone
    predicted = np.empty(len(queries), dtype=np.int64)
    k = min(k, len(points))
    for start in range(0, len(queries), 256):
        chunk = slice(start, start + 256)
        distance = np.linalg.norm(queries[chunk, None] - points[None], axis=-1)
        reach = np.partition(distance, k - 1, axis=1)[:, k - 1 : k]
        votes = (distance <= reach + 1e-12) @ one_hot
        predicted[chunk] = (votes + share).argmax(1)
    return predicted


def _sizes_and_names(
    metadata: Metadata, set_name: str
) -> tuple[Float64[np.ndarray, "N 2"], Sequence[str]]:
    """Log sizes and class names of a set's samples that have both."""
    sizes: list[tuple[float, float]] = []
    names: list[str] = []
    for fields in metadata.values():
        label = class_label(fields)
        width = fields.get("orig_width", fields.get("width"))
        height = fields.get("orig_height", fields.get("height"))
        if label is not None and label[0] == set_name and width and height:
            sizes.append((float(width), float(height)))
            names.append(label[1])
    return np.log(np.array(sizes, dtype=np.float64).reshape(-1, 2)), names
