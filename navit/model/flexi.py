"""A trained model as one of other patch sizes, flexible or fixed at one, or of another grid."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from navit.model.config import GridInterpolation
from navit.model.grid_embed import resize_grid
from navit.model.pi_resize import pi_buffer, pi_resize

M = TypeVar("M", bound="Flexible")


class Flexible(nn.Module):
    """What models with an image tower share: copies of themselves for other sizes.

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

        Raises:
            ValueError: If the model has a convolutional stem.
        """
        return self._with_patches({"patch_buffer": patch_buffer}, pi_buffer, patch_buffer)

    def at_patch_size(self: M, patch_size: int) -> M:
        """Return a copy with weights for patches of one size, to be run as a model of that size.

        Larger patches than the weights' own, or a buffer's, lose nothing: a patch that is enlarged
        has the token it had.

        Args:
            patch_size: Side in pixels.

        Raises:
            ValueError: If the model has a convolutional stem.
        """
        changes = {"patch_size": patch_size, "patch_buffer": None}
        return self._with_patches(changes, pi_resize, patch_size)

    @torch.no_grad()
    def at_grid(self: M, size: int, interpolation: GridInterpolation | None = None) -> M:
        """Return a copy whose learned grid of positions has another size, to be trained on.

        Without it a tower reads images of more patches between the entries of its table, and
        training moves only those few. An image of ``size`` x ``size`` patches has the positions
        it had, if the interpolation is the model's.

        Args:
            size: Side of the new table in patches.
            interpolation: How the table is resized: "corners" as in ViT's code; None, as the
                model reads it.

        Raises:
            ValueError: If the model has no learned grid.

        Source: ViT (arXiv:2010.11929), section 3.2 "Fine-tuning and higher resolution".
        """
        model = deepcopy(self)
        tower = _with_config(model, {"pos_table_size": size})
        if tower.config.pos_embed != "grid":
            raise ValueError(
                f"at_grid resizes the table of pos_embed 'grid'; got {tower.config.pos_embed!r}, "
                "which takes grids of any size as it is."
            )
        old = tower.pos_embed.table
        new = resize_grid(old, size, interpolation or tower.config.pos_interpolation)
        tower.pos_embed.size = size
        tower.pos_embed.table = nn.Parameter(new, requires_grad=old.requires_grad)
        return model

    @torch.no_grad()
    def _with_patches(
        self: M, changes: dict[str, Any], resize: Callable[[Tensor, int], Tensor], side: int
    ) -> M:
        """Copy the model, its patch embedding's weights resized to a side in pixels."""
        from navit.model.vision import make_patch_embed  # the tower is one of these models

        stem = getattr(self, "vision", self).config.stem
        if stem is not None:
            raise ValueError(
                "A model of other patch sizes is made by resizing the projection of its patches; "
                f"got one with the stem {stem!r}, whose convolutions have one stride. Train it "
                "with stem=None."
            )
        model = deepcopy(self)
        tower = _with_config(model, changes)
        old = tower.patch_embed
        new: Any = make_patch_embed(tower.config)
        new = new.to(old.proj.weight.device, old.proj.weight.dtype)
        new.proj.weight.copy_(resize(old.proj.weight, side))
        if old.proj.bias is not None:
            new.proj.bias.copy_(old.proj.bias)
        tower.patch_embed = new.train(old.training)
        return model


def _with_config(model: Any, changes: dict[str, Any]) -> Any:
    """Change fields of a model's image tower, and return the tower."""
    tower = getattr(model, "vision", model)
    tower.config = replace(tower.config, **changes)
    if tower is not model:
        model.config = replace(model.config, vision=tower.config)
    return tower
