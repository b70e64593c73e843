"""A trained model as one of other patch sizes: flexible, or fixed at one."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from navit.model.pi_resize import pi_buffer, pi_resize

M = TypeVar("M", bound="Flexible")


class Flexible(nn.Module):
    """What models with an image tower share: copies of themselves for other patch sizes.

    Source: FlexiViT (arXiv:2212.08013), section 3.4 "Pseudo-inverse resize".
    """

    config: Any

    def flexible(self: M, patch_buffer: int = 32) -> M:
        """Return a copy that takes patches of any size, mixed in one batch too.

        At its own patch size, where the buffer is not smaller, it gives what it gave but for
        rounding. At others it is where training starts. To run a trained model at another size
        without training, `at_patch_size` loses less.

        Args:
            patch_buffer: Side in pixels the weights are kept at. A flexible model's buffer is
                resized to it as a patch.
        """
        return self._with_patches({"patch_buffer": patch_buffer}, pi_buffer, patch_buffer)

    def at_patch_size(self: M, patch_size: int) -> M:
        """Return a copy with weights for patches of one size, to be run as a model of that size.

        Larger patches than the weights' own, or a buffer's, lose nothing: a patch that is enlarged
        has the token it had.

        Args:
            patch_size: Side in pixels.
        """
        changes = {"patch_size": patch_size, "patch_buffer": None}
        return self._with_patches(changes, pi_resize, patch_size)

    @torch.no_grad()
    def _with_patches(
        self: M, changes: dict[str, Any], resize: Callable[[Tensor, int], Tensor], side: int
    ) -> M:
        """Copy the model, its patch embedding's weights resized to a side in pixels."""
        from navit.model.vision import make_patch_embed  # the tower is one of these models

        model = deepcopy(self)
        tower: Any = getattr(model, "vision", model)
        tower.config = replace(tower.config, **changes)
        if tower is not model:
            model.config = replace(model.config, vision=tower.config)
        old = tower.patch_embed
        new = make_patch_embed(tower.config).to(old.proj.weight.device, old.proj.weight.dtype)
        new.proj.weight.copy_(resize(old.proj.weight, side))
        if old.proj.bias is not None:
            new.proj.bias.copy_(old.proj.bias)
        tower.patch_embed = new.train(old.training)
        return model
