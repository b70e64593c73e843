"""Patches of uint8 pixels -> vectors of model width."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from navit.model.attention import compute_dtype
from navit.model.config import PerChannel
from navit.model.linear import linear
from packer.batch import PackedBatch

HALVES: PerChannel = (0.5, 0.5, 0.5)


class PatchEmbed(nn.Module):
    """Normalise pixels on the device, by default to [-1, 1], and project each patch.

    Pixels cross to the device as uint8, a quarter of the bytes of float32. With mean and deviation
    of 0.5, ``(x - 127.5) / 127.5`` is applied in two places: the difference to the pixels, where it
    is exact even in bfloat16 (8 significant bits hold every multiple of 0.5 up to 127.5), the
    quotient to the weights. Other means and deviations per channel c are
    ``(x - 127.5) / (255 std_c) + (0.5 - mean_c) / std_c``: again the quotient goes to the weights,
    and the weights' sum over the second term to the bias.

    Args:
        patch_size: P, side of a patch in pixels.
        width: D.
        bias: Whether the projection has a bias.
        mean: Mean of red, green and blue in [0, 1].
        std: Their standard deviation.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        *,
        bias: bool = False,
        mean: PerChannel = HALVES,
        std: PerChannel = HALVES,
    ) -> None:
        super().__init__()
        self.patch_size, self.mean, self.std = patch_size, mean, std
        self.proj = nn.Linear(3 * patch_size**2, width, bias=bias)
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)

    def forward(self, patches: UInt8[Tensor, "T P"]) -> Float[Tensor, "T D"]:
        """Embed patches whose values are in (row, column, channel) order."""
        return project(patches, self.proj.weight, self.proj.bias, self.mean, self.std)

    def check_patches(self, batch: PackedBatch) -> None:
        """Refuse patches of other sizes, which would only fail as a matrix shape.

        Raises:
            ValueError: If a patch of the batch has not the size the embedding was made for.
        """
        if batch.patch_sizes is not None:
            raise ValueError(
                f"All patches of a batch must have the model's size ({self.patch_size}); got "
                f"{sorted(set(batch.segment_patch_sizes) - {0})}. Make the model flexible: "
                "model.flexible(), or NaViTConfig(patch_buffer=32)."
            )
        if batch.patch_size != self.patch_size:
            raise ValueError(
                f"The batch's patch_size must be the model's ({self.patch_size}); got "
                f"{batch.patch_size}. Set PackerConfig(patch_size={self.patch_size}), or the "
                f"model's NaViTConfig(patch_size={batch.patch_size}); model.flexible() takes any."
            )


def project(
    patches: UInt8[Tensor, "T P"],
    weight: Float[Tensor, "D P"],
    bias: Float[Tensor, " D"] | None,
    mean: PerChannel,
    std: PerChannel,
) -> Float[Tensor, "T D"]:
    """Normalise patches by channel and multiply them by weights of their size."""
    centred = patches.to(compute_dtype(patches.device, weight.dtype)).sub_(127.5)
    if (mean, std) == (HALVES, HALVES):
        return linear(centred, weight * (1 / 127.5), bias)
    return linear(centred, *_folded(weight, bias, mean, std))


def _folded(
    weight: Float[Tensor, "D P"],
    bias: Float[Tensor, " D"] | None,
    mean: PerChannel,
    std: PerChannel,
) -> tuple[Float[Tensor, "D P"], Float[Tensor, " D"]]:
    """Return weight and bias for pixels minus 127.5."""
    # Numbers of Python, not a tensor of them: nothing to move to the device or to cast.
    channels = weight.view(weight.shape[0], -1, 3).unbind(2)
    scaled = [w * (1 / (255 * s)) for w, s in zip(channels, std, strict=True)]
    shift = sum(w.sum(1) * ((0.5 - m) / s) for w, m, s in zip(channels, mean, std, strict=True))
    assert isinstance(shift, Tensor)
    return torch.stack(scaled, dim=2).flatten(1), shift if bias is None else shift + bias
