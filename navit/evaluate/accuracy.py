"""Scores of classes -> ranks, and ranks -> accuracy and mean recall of the classes."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from navit.evaluate.retrieval import NOT_FOUND

KS = (1, 5)
"""Ranks that accuracy is reported at."""


def class_ranks(scores: Float[Tensor, "N C"], classes: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """Count, per image, the other classes that score at least as high as its own.

    Args:
        scores: One score per image and class.
        classes: Class of each image. One that has no score, C or above, is never found.

    Returns:
        Ranks from 0; `NOT_FOUND` where the own class has no finite score. A tie counts against
        the image: equal scores for all classes put every image at rank C - 1.
    """
    num_classes = scores.shape[1]
    ranks = classes.new_full((len(classes),), NOT_FOUND)
    known = classes < num_classes
    if num_classes and bool(known.any()):
        found = scores[known].nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        own = found.gather(1, classes[known, None])
        before = (found >= own).sum(1) - 1
        ranks[known] = torch.where(own[:, 0] > -torch.inf, before, NOT_FOUND)
    return ranks


def ranks_in_chunks(
    score: Callable[[slice], Tensor], classes: Int64[Tensor, " N"], *, chunk_size: int = 1024
) -> Int64[Tensor, " N"]:
    """Rank the images chunk by chunk, so that no N x C matrix is ever held.

    Args:
        score: Scores of a slice of the images, (n, C).
        classes: Class of each image.
        chunk_size: Images scored at a time.
    """
    parts = [slice(start, start + chunk_size) for start in range(0, len(classes), chunk_size)]
    ranks = [class_ranks(score(part), classes[part]) for part in parts]
    return torch.cat(ranks) if ranks else classes.new_zeros(0)


def accuracies(
    ranks: Int64[Tensor, " N"],
    classes: Int64[Tensor, " N"],
    name: str,
    *,
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Turn ranks into shares.

    Args:
        ranks: Rank of each image's own class, from 0.
        classes: Class of each image.
        name: What stands before the metrics' names.
        ks: Ranks to report.

    Returns:
        ``"<name>accuracy@k"``, the share of images with their class among the first k, and
        ``"<name>class_recall"``, the mean over the classes that occur of the share of their images
        with the class first: large classes count no more than small ones. All in [0, 1]; 0 without
        images.
    """
    found = {f"{name}accuracy@{k}": _mean((ranks < k).double()) for k in ks}
    _, index, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    hits = torch.zeros(len(counts), dtype=torch.float64)
    hits.index_add_(0, index.cpu(), (ranks < 1).double().cpu())
    return {**found, f"{name}class_recall": _mean(hits / counts.cpu())}


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
