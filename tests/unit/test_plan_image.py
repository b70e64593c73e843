from hypothesis import given
from hypothesis import strategies as st

from packer.config import PackerConfig
from packer.plan.drop import BetaDrop, ConstantDrop, NoDrop, ResolutionDrop, ScheduledDrop
from packer.plan.image import plan_image
from packer.plan.resize import (
    FixedSide,
    Native,
    NoCrop,
    NormalArea,
    NormalSide,
    RandomCrop,
    UniformArea,
    UniformSide,
)
from packer.plan.types import Grid, ImageSize

sizes = st.builds(ImageSize, st.integers(1, 3000), st.integers(1, 3000))
configs = st.builds(
    PackerConfig,
    patch_size=st.sampled_from([4, 14, 16]),
    seq_len=st.just(256),
    max_tokens=st.sampled_from([None, 1, 7, 256]),
    resolution=st.sampled_from(
        [
            Native(),
            FixedSide(64),
            UniformSide(32, 256),
            NormalSide(32, 96),
            UniformArea(32, 256),
            NormalArea(32, 96),
        ]
    ),
    crop=st.sampled_from([NoCrop(), RandomCrop(0.3, 1.5)]),
    token_drop=st.sampled_from(
        [
            NoDrop(),
            ConstantDrop(0.9),
            BetaDrop(0.5, 0.8),
            ResolutionDrop(),
            ScheduledDrop(1000, -200),
            ScheduledDrop(1000, 200, maximum=0.9),
        ]
    ),
    resize=st.sampled_from(["shrink_only", "allow_enlarge", "fill_budget"]),
    seed=st.integers(0, 5),
)


@given(
    key=st.text(max_size=8),
    size=sizes,
    config=configs,
    epoch=st.integers(0, 3),
    images_seen=st.integers(0, 10**12),
)
def test_every_plan_keeps_its_bounds(
    key: str, size: ImageSize, config: PackerConfig, epoch: int, images_seen: int
) -> None:
    plan = plan_image(key, size, config, epoch=epoch, images_seen=images_seen)
    assert 1 <= plan.num_kept <= plan.grid.num_tokens <= config.image_budget
    assert (plan.key, plan.size, plan.patch_size) == (key, size, config.patch_size)
    if plan.box is None:
        shown = size
    else:
        top, left, height, width = plan.box
        assert 0 <= top < top + height <= size.height
        assert 0 <= left < left + width <= size.width
        shown = ImageSize(height, width)
    if config.resize == "shrink_only":
        native = (
            max(shown.height // config.patch_size, 1),
            max(shown.width // config.patch_size, 1),
        )
        assert plan.grid.num_tokens <= native[0] * native[1]
    assert plan == plan_image(key, size, config, epoch=epoch, images_seen=images_seen)
    if not isinstance(config.token_drop, ScheduledDrop):
        assert plan == plan_image(key, size, config, epoch=epoch)


def test_a_schedule_changes_how_many_tokens_are_kept_and_no_other_draw() -> None:
    config = PackerConfig(patch_size=10, token_drop=ScheduledDrop(1000, -100, 0.2, 0.8))
    early, late = (
        plan_image("k", ImageSize(100, 100), config, images_seen=seen) for seen in (0, 10**6)
    )
    assert (early.num_kept, late.num_kept) == (21, 80)
    assert early == late._replace(num_kept=21)


def test_defaults_keep_every_token_of_the_native_image() -> None:
    plan = plan_image("k", ImageSize(100, 70), PackerConfig(patch_size=16))
    assert (plan.box, plan.grid, plan.num_kept) == (None, Grid(6, 4), 24)


def test_seed_epoch_and_key_each_change_every_draw() -> None:
    size, config = ImageSize(100, 70), PackerConfig(crop=RandomCrop(), resolution=UniformSide())
    base = plan_image("k", size, config)
    for other in (
        plan_image("l", size, config),
        plan_image("k", size, config, epoch=1),
        plan_image("k", size, PackerConfig(crop=RandomCrop(), resolution=UniformSide(), seed=1)),
    ):
        for name in ("box", "kept_draw", "augment_draw", "caption_draw"):
            assert getattr(other, name) != getattr(base, name)


def test_the_crop_decides_the_grid() -> None:
    config = PackerConfig(patch_size=10, crop=RandomCrop(min_area=0.2), seq_len=4096)
    for key in map(str, range(20)):
        plan = plan_image(key, ImageSize(400, 300), config)
        assert plan.box is not None
        assert plan.grid == (plan.box.height // 10, plan.box.width // 10)
