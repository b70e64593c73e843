"""Ridge regression on class targets in closed form, from sums that a stream of vectors adds to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

_CONSTANT = 1e-6  # of its own size: a feature that varies less says nothing but rounding


@dataclass(frozen=True)
class LinearClassifier:
    """Class scores as a linear function of a vector."""

    weight: Float64[Tensor, "D C"]
    """Weights on the vectors as they come."""
    bias: Float64[Tensor, " C"]
    """Scores of the vector 0."""
    strength: float
    """Ridge strength it was solved with."""

    def scores(self, vectors: Float[Tensor, "N D"]) -> Float64[Tensor, "N C"]:
        """Score every class for every vector."""
        return vectors.double() @ self.weight + self.bias


class Moments:
    """Sums over labelled vectors, in float64: all that ridge regression needs of them.

    Memory is D x D and C x D numbers, however many vectors are added. The classes grow as larger
    labels come.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        """Vectors added."""
        self.second = torch.zeros(dim, dim, dtype=torch.float64)
        """Sum of x x^T, (D, D)."""
        self.class_sum = torch.zeros(0, dim, dtype=torch.float64)
        """Sum of the vectors of each class, (C, D)."""
        self.class_count = torch.zeros(0, dtype=torch.float64)
        """Vectors of each class, (C,)."""

    def add(self, vectors: Float[Tensor, "N D"], classes: Int64[Tensor, " N"]) -> None:
        """Add labelled vectors; those that are not finite must be left out before."""
        if not len(vectors):
            return
        x = vectors.double()
        missing = int(classes.max()) + 1 - len(self.class_count)
        if missing > 0:
            self.class_sum = torch.cat([self.class_sum, x.new_zeros(missing, x.shape[1])])
            self.class_count = torch.cat([self.class_count, x.new_zeros(missing)])
        self.count += len(x)
        self.second.addmm_(x.T, x)
        self.class_sum.index_add_(0, classes, x)
        self.class_count.index_add_(0, classes, torch.ones(len(x), dtype=torch.float64))

    def solve(self, strengths: Sequence[float]) -> list[LinearClassifier]:
        """Solve the regression for several strengths at the cost of one decomposition.

        The target of a vector is 1 for its class and -1 for all others. Features are standardised
        to mean 0 and variance 1 over the vectors added, the intercept is not penalised, and the
        strength multiplies the squared weights beside the mean squared error, so that it means the
        same for any number and any scale of vectors. A feature that does not vary gets weight 0.

        Args:
            strengths: Positive numbers.

        Raises:
            ValueError: If no vector was added, or a strength is not positive.

        Source: ViT (arXiv:2010.11929), section 4.1 "Metrics": a regularised least-squares
        regression to targets {-1, 1}^K, solved in closed form. Standardised features are our
        choice, as in its authors' code.
        """
        if not self.count:
            raise ValueError("at least one labelled vector must be added; got none.")
        if min(strengths) <= 0:
            raise ValueError(f"ridge strengths must be positive; got {list(strengths)}.")
        mean = self.class_sum.sum(0) / self.count
        covariance = self.second / self.count - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        size = torch.maximum(mean.abs(), deviation.max())
        varies = deviation > _CONSTANT * size
        scale = torch.where(varies, 1 / deviation.where(varies, 1), 0.0)
        share = self.class_count / self.count
        values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
        target = 2 * (self.class_sum / self.count - share[:, None] * mean) * scale  # (C, D)
        rotated = vectors.T @ target.T
        found = []
        for strength in strengths:
            shrunk = rotated / (values.clamp(min=0) + strength)[:, None]
            weight = scale[:, None] * (vectors @ shrunk)
            found.append(LinearClassifier(weight, 2 * share - 1 - mean @ weight, strength))
        return found
