"""Vectors of parts -> vectors of chunks and of whole inputs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from navit.embed.parts import Failure, Part
from packer.batch import BatchStats

NOT_FINITE = "not_finite"
"""Cause of a failure: the model's vector has values that are NaN or infinite."""


@dataclass(frozen=True)
class Embeddings:
    """What became of a number of images."""

    vectors: Float32[Tensor, "N D"]
    """One vector for each image of the input, on the CPU; NaN for those that failed."""
    failures: tuple[Failure, ...]
    """The images that failed, in order; ``index`` is the row."""
    stats: BatchStats
    """Counts of images and tokens, and of failures by cause."""


@dataclass(frozen=True)
class ChunkVectors:
    """One chunk, embedded."""

    number: int
    """Number of the chunk."""
    vectors: Float32[Tensor, "n D"]
    """One vector for each image that did not fail, in order."""
    keys: tuple[str, ...]
    """Their keys."""
    indices: tuple[int, ...]
    """Their places in the chunk."""
    failures: tuple[Failure, ...]
    """Those that failed, in order."""


class Fetched(NamedTuple):
    """A part with its vectors, which may still be under way from the device."""

    part: Part
    """What was embedded."""
    vectors: Tensor
    """float32 (n, D) on the CPU, in the order of the part's images."""
    event: "torch.cuda.Event | None"
    """Reached when the vectors are there; None where they are."""

    def wait(self) -> "Fetched":
        """Return when the vectors are there."""
        if self.event is not None:
            self.event.synchronize()
        return self


def count(stats: BatchStats, part: Part) -> BatchStats:
    """Add a part's images, tokens and failures to the counts."""
    failed = Counter(failure.cause for failure in part.failures)
    stats = stats + BatchStats(
        samples_read=len(part.indices) + len(part.failures), skipped=dict(failed)
    )
    return stats if part.batch is None else stats + part.batch.stats


def join(number: int, fetched: Sequence[Fetched], dim: int) -> ChunkVectors:
    """Put the images of a chunk back into their order; those without a finite vector failed.

    Args:
        number: Number of the chunk.
        fetched: Its parts.
        dim: D.
    """
    indices = np.array([i for f in fetched for i in f.part.indices], dtype=np.int64)
    keys = [key for f in fetched for key in f.part.keys]
    vectors = torch.cat([torch.zeros(0, dim), *(f.vectors for f in fetched)])
    finite = vectors.isfinite().all(1).numpy()
    failures = [failure for f in fetched for failure in f.part.failures]
    detail = "the model returned values that are NaN or infinite"
    failures += [
        Failure(int(indices[row]), keys[row], NOT_FINITE, detail) for row in np.flatnonzero(~finite)
    ]
    order = [int(row) for row in np.argsort(indices) if finite[row]]
    return ChunkVectors(
        number=number,
        vectors=vectors[torch.tensor(order, dtype=torch.int64)],
        keys=tuple(keys[row] for row in order),
        indices=tuple(int(indices[row]) for row in order),
        failures=tuple(sorted(failures)),
    )
