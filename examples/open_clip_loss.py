"""The tiled loss in the place of open_clip's: same call, same value, no N x N matrix.

In open_clip, `create_loss(args)` returns a `ClipLoss`; return a `TiledClipLoss` there instead. It
also takes what `ClipLoss` cannot: another number of pairs on each rank. Here both are given the
same features, open_clip's replaced by its formula.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from navit.loss import contrastive_loss


class TiledClipLoss(nn.Module):
    """Drop-in for `open_clip.ClipLoss`: exact, tiled, over all ranks where there are several.

    Gradients are those that DDP's averaging makes exact, as with open_clip's ``local_loss=True,
    gather_with_grad=True``.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of normalised features (N, D), as `open_clip.ClipLoss` does."""
        group = dist.group.WORLD if dist.is_initialized() else None
        loss = contrastive_loss(image_features, text_features, logit_scale, group=group)
        return {"contrastive_loss": loss} if output_dict else loss


def main() -> None:
    """Compare value and gradient with the dense formula."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(1000, 64), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0)
    tiled = TiledClipLoss()(image, text, scale)
    scores, target = scale * image @ text.T, torch.arange(1000)
    dense = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    (found,) = torch.autograd.grad(tiled, image)
    (expected,) = torch.autograd.grad(dense, image)
    print(f"loss {tiled.item():.6f}, dense {dense.item():.6f}")
    print(f"largest difference of a gradient {(found - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
