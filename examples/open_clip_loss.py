"""The tiled losses in the place of open_clip's: same call, same value, no N x N matrix.

In open_clip, `create_loss(args)` returns a `ClipLoss` or a `SigLipLoss`; return a `TiledClipLoss`
or a `TiledSigLipLoss` there instead. They also take what those cannot: another number of pairs on
each rank. Here both are given the same features as the dense formulas.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from navit.loss import contrastive_loss, sigmoid_loss


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
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of normalised features (N, D), as `open_clip.ClipLoss` does.

        A bias, the same for all scores, changes nothing in a softmax; its gradient is 0.
        """
        loss = contrastive_loss(image_features, text_features, logit_scale, group=_ranks())
        if logit_bias is not None:
            loss = loss + 0 * logit_bias
        return {"contrastive_loss": loss} if output_dict else loss


class TiledSigLipLoss(nn.Module):
    """Drop-in for `open_clip.SigLipLoss`, likewise.

    The value is the mean over the pairs of all ranks, where open_clip's is over the rank's own.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of normalised features (N, D), as `open_clip.SigLipLoss` does."""
        loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, group=_ranks())
        return {"contrastive_loss": loss} if output_dict else loss


def _ranks() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def main() -> None:
    """Compare values and gradients with the dense formulas."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(1000, 64), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(20.0), torch.tensor(-10.0)
    scores, target = scale * image @ text.T, torch.arange(1000)
    softmax = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    sigmoid = -F.logsigmoid((2 * torch.eye(1000) - 1) * (scores + bias)).sum() / 1000
    for name, tiled, dense in (
        ("softmax", TiledClipLoss()(image, text, scale, bias), softmax),
        ("sigmoid", TiledSigLipLoss()(image, text, scale, bias), sigmoid),
    ):
        (found,) = torch.autograd.grad(tiled, image, retain_graph=True)
        (expected,) = torch.autograd.grad(dense, image, retain_graph=True)
        print(f"{name}: loss {tiled.item():.6f}, dense {dense.item():.6f}")
        print(f"largest difference of a gradient {(found - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
