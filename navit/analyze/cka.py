"""Linear centred kernel alignment: how alike two sets of vectors of the same images are."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

MIN_IMAGES = 4
"""Images the unbiased estimator needs."""


def unbiased_hsic(
    k: Float[Tensor, "*a n n"],
    l: Float[Tensor, "*b n n"],  # noqa: E741
) -> Float[Tensor, "*c"]:
    """Estimate the Hilbert-Schmidt independence criterion from two Gram matrices, without bias.

    Args:
        k: Gram matrices of n images; leading axes broadcast.
        l: The same of the other representation.

    Raises:
        ValueError: If there are fewer than 4 images.

    Source: Nguyen et al. (arXiv:2010.15327), equation 3, the estimator of Song et al. (2012).
    """
    n = k.shape[-1]
    if n < MIN_IMAGES:
        raise ValueError(f"HSIC needs at least {MIN_IMAGES} images; got {n}. Give more images.")
    eye = torch.eye(n, dtype=torch.bool, device=k.device)
    k, l = k.masked_fill(eye, 0), l.masked_fill(eye, 0)  # noqa: E741
    # trace(K L), 1' K 1 * 1' L 1 and 1' K L 1; both matrices are symmetric.
    trace = (k * l).sum((-2, -1))
    sums = k.sum((-2, -1)) * l.sum((-2, -1)) / ((n - 1) * (n - 2))
    rows = (k.sum(-1) * l.sum(-1)).sum(-1) * 2 / (n - 2)
    return (trace + sums - rows) / (n * (n - 3))


class MinibatchCka:
    """Linear CKA of every layer of one representation with every layer of another, by batches.

    Numerator and both parts of the denominator are means of unbiased estimates over batches, so the
    result does not depend on the batch size but for noise, and of all images only sums of
    (layers, layers) values are kept. A batch takes layers * n * n values for its Gram matrices.

    Source: Nguyen et al. (arXiv:2010.15327), section 3.1 and equations 2 to 4; used across patch
    sizes by FlexiViT (arXiv:2212.08013), appendix on similarity of representations.
    """

    def __init__(self) -> None:
        self.images = 0
        """Images seen."""
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, a: Sequence[Float[Tensor, "_ _"]], b: Sequence[Float[Tensor, "_ _"]]) -> None:
        """Count a batch of n >= 4 images.

        Args:
            a: A vector an image, by layer; widths may differ.
            b: The same images in the other representation.

        Raises:
            ValueError: If there are fewer than 4 images, or not the same number everywhere.
        """
        counts = sorted({len(x) for x in (*a, *b)})
        if len(counts) != 1:
            raise ValueError(f"all layers must have vectors of the same images; got {counts}.")
        k, l = (torch.stack([_gram(x) for x in layers]) for layers in (a, b))  # noqa: E741
        found = (
            unbiased_hsic(k[:, None], l[None]),
            unbiased_hsic(k, k),
            unbiased_hsic(l, l),
        )
        old = self._sums
        self._sums = (
            found if old is None else (old[0] + found[0], old[1] + found[1], old[2] + found[2])
        )
        self.images += counts[0]

    def result(self) -> Float[Tensor, "A B"]:
        """Return the similarities, float64; NaN where a layer is the same for all images.

        Raises:
            ValueError: If nothing was added.
        """
        if self._sums is None:
            raise ValueError("CKA needs at least one batch of images; got none.")
        both, own_a, own_b = self._sums
        scale = own_a.clamp(min=0).sqrt()[:, None] * own_b.clamp(min=0).sqrt()[None]
        return torch.where(scale > 0, both / scale, torch.nan).cpu()


def linear_cka(x: Float[Tensor, "n D1"], y: Float[Tensor, "n D2"]) -> float:
    """Return the linear CKA of two representations of n >= 4 images, all in one batch."""
    cka = MinibatchCka()
    cka.add([x], [y])
    return float(cka.result())


def _gram(x: Float[Tensor, "n D"]) -> Float[Tensor, "n n"]:
    # HSIC is that of centred kernels: to centre first changes nothing and saves digits.
    centred = x.double() - x.double().mean(0)
    return centred @ centred.T
