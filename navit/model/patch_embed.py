"""Patches of uint8 pixels -> vectors of model width."""

from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from navit.model.attention import compute_dtype


class PatchEmbed(nn.Module):
    """Normalise pixels to [-1, 1] on the device and project each patch.

    Pixels cross to the device as uint8, a quarter of the bytes of float32. ``(x - 127.5) / 127.5``
    is applied in two places: the difference to the pixels, where it is exact even in bfloat16
    (8 significant bits hold every multiple of 0.5 up to 127.5), the quotient to the weights.
    """

    def __init__(self, patch_size: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(3 * patch_size**2, width, bias=bias)
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)

    def forward(self, patches: UInt8[Tensor, "T P"]) -> Float[Tensor, "T D"]:
        """Embed patches whose values are in (row, column, channel) order."""
        weight = self.proj.weight
        dtype = compute_dtype(patches.device, weight.dtype)
        centred = patches.to(dtype).sub_(127.5)
        return F.linear(centred, weight * (1 / 127.5), self.proj.bias)

    def check_patch_size(self, patch_size: int) -> None:
        """Refuse patches of another size, which would only fail as a matrix shape.

        Raises:
            ValueError: If ``patch_size`` is not the one the embedding was made for.
        """
        if patch_size != self.patch_size:
            raise ValueError(
                f"The batch's patch_size must be the model's ({self.patch_size}); got "
                f"{patch_size}. Set PackerConfig(patch_size={self.patch_size}), or the model's "
                f"NaViTConfig(patch_size={patch_size})."
            )
