"""Size and key of one image -> its `ImagePlan`: every decision about it, before any pixel."""

from packer.config import PackerConfig
from packer.plan.draws import keyed_draws
from packer.plan.drop import num_kept_tokens
from packer.plan.patch_size import OnePatchSize
from packer.plan.resize import budget_from_side, plan_resize
from packer.plan.types import ImagePlan, ImageSize


def plan_image(
    key: str, size: ImageSize, config: PackerConfig, *, epoch: int = 0, images_seen: int = 0
) -> ImagePlan:
    """Decide crop, patch size, grid and number of kept tokens of one image.

    Args:
        key: The sample's key; with ``config.seed`` and ``epoch`` it determines every draw.
        size: Native size in pixels, after EXIF orientation.
        config: The packer's configuration.
        epoch: Passes over the data completed before this one.
        images_seen: Images the whole run has seen before this one; only schedules read it.

    Returns:
        The plan; ``1 <= num_kept <= grid.num_tokens <= config.image_budget``.
    """
    draws = keyed_draws(config.seed, epoch, key)
    box = config.crop.box(size, draws.crop)
    shown = size if box is None else ImageSize(box.height, box.width)
    side = config.resolution.side(draws.resolution)
    patch_size, budget = config.patch_size, config.image_budget
    if not isinstance(config.patch_sizes, OnePatchSize):
        patch_size = config.patch_sizes.choose(
            draws.patch_size, shown, side, budget, policy=config.resize, images_seen=images_seen
        )
    grid = plan_resize(
        shown,
        patch_size=patch_size,
        max_tokens=budget_from_side(side, patch_size, budget),
        policy=config.resize,
    )
    rate = config.token_drop.rate(grid.num_tokens, draws.drop_rate, images_seen)
    return ImagePlan(
        key=key,
        size=size,
        box=box,
        grid=grid,
        patch_size=patch_size,
        num_kept=num_kept_tokens(grid.num_tokens, rate),
        kept_draw=draws.kept,
        augment_draw=draws.augment,
        caption_draw=draws.caption,
    )
