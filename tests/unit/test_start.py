"""Where a model starts: given weights, made flexible or of another grid; frozen towers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from navit import NaViT, NaViTConfig
from navit.model.clip import CLIP
from navit.model.config import CLIPConfig
from navit.train.config import TrainConfig
from navit.train.ema import Ema
from navit.train.optim import OptimConfig, build_optimizers
from navit.train.ranks import alone
from navit.train.start import start_of_pair, start_of_tower
from navit.train.step import gradients
from navit.train.teacher import check_tokenizer, given_tokenizer
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.plan.drop import ConstantDrop
from packer.plan.patch_size import RandomPatchSize
from tests.helpers.batches import pack_images, random_images
from tests.helpers.distributed import CPU
from tests.helpers.splits import Case, make_batch, make_task

SHAPE: dict[str, Any] = {"width": 16, "mlp_dim": 24, "pos_embed": "grid", "pos_table_size": 3}


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, NaViT]:
    torch.manual_seed(0)
    tower = NaViT(NaViTConfig.named("tiny", patch_size=4, **SHAPE)).eval()
    tower.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower", tower


def run_of(init: Path | None, **changes: Any) -> TrainConfig:
    packer = PackerConfig(**{"patch_size": 4, "seq_len": 30, **changes.pop("packer", {})})
    vision = NaViTConfig.named("tiny", **changes.pop("vision", {}))
    model = CLIPConfig(vision=vision)
    return TrainConfig(shards=("none.tar",), packer=packer, model=model, init=init, **changes)


def start(config: TrainConfig) -> NaViT:
    shape, weights = start_of_tower(config)
    tower = NaViT(shape).eval()
    assert weights is not None
    tower.load_state_dict(weights)
    return tower


def test_a_fixed_tower_starts_a_flexible_run_as_what_it_was(weights: tuple[Path, NaViT]) -> None:
    folder, tower = weights
    sizes = {"patch_sizes": RandomPatchSize((4, 8))}
    found = start(run_of(folder, packer=sizes, vision={"patch_buffer": 8}))
    assert (found.config.patch_buffer, found.config.patch_size) == (8, 4)
    batch = pack_images(random_images(4, seed=0, patch_size=4))
    torch.testing.assert_close(found(batch).pooled, tower(batch).pooled, rtol=0, atol=1e-5)


def test_a_grid_is_resized_for_another_resolution(weights: tuple[Path, NaViT]) -> None:
    folder, tower = weights
    found = start(run_of(folder, init_grid=5))
    assert found.config.pos_table_size == 5
    expected = tower.at_grid(5, "corners").pos_embed.table
    assert torch.equal(found.pos_embed.table, expected)


def test_a_stem_is_not_started_where_tokens_are_dropped() -> None:
    stem = {"patch_size": 16, "stem": "resnet", "stem_width": 16, "stem_stages": (1, 1)}
    dropping = {"patch_size": 16, "token_drop": ConstantDrop(0.5)}
    with pytest.raises(ValueError, match="a convolutional stem needs every image whole"):
        start_of_tower(run_of(None, packer=dropping, vision=stem))
    start_of_tower(run_of(None, packer={"patch_size": 16}, vision=stem))


def test_patches_of_other_sizes_need_a_flexible_tower(weights: tuple[Path, NaViT]) -> None:
    folder, _ = weights
    with pytest.raises(ValueError, match=r"weights in .*\(4\); got 8.*patch-buffer 32"):
        start_of_tower(run_of(folder, packer={"patch_size": 8}))
    with pytest.raises(ValueError, match=r"several sizes.*4 pixels alone.*patch-buffer 32"):
        start_of_tower(run_of(None, packer={"patch_sizes": RandomPatchSize((4, 8))}))


@pytest.mark.parametrize(
    ("case", "frozen", "learning"),
    [
        (Case("softmax", (), frozen=("text",)), ("text.",), "vision."),
        (Case("sigmoid", (), frozen=("vision",)), ("vision.",), "text."),
        (Case("labels", (), frozen=("vision",)), ("vision.",), "head."),
    ],
)
def test_a_frozen_tower_keeps_its_bits_and_costs_no_state(
    case: Case, frozen: tuple[str, ...], learning: str
) -> None:
    task = make_task(case)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    optimizers, average = build_optimizers(task.model, OptimConfig()), Ema(task.model, 0.5)
    optimizers.set_lr(1.0)
    for samples in (range(4), range(3, 9)):
        optimizers.zero_grad()
        gradients(task, task.model, [make_batch(samples)], alone(CPU))
        optimizers.step()
        average.update(task.model)

    after = task.model.state_dict()
    for name, value in before.items():
        if name.startswith(frozen):
            assert torch.equal(after[name], value)
            assert torch.equal(average.average[name], value)
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert any(name.startswith(learning) for name in moved)
    assert not any(name.startswith(frozen) for name in optimizers.tensors())


def test_a_frozen_tower_drops_no_paths() -> None:
    frozen = make_task(Case("softmax", (), drop_path=0.5, frozen=("vision",))).model
    assert isinstance(frozen, CLIP)
    assert frozen.config.vision.drop_path == 0
    assert frozen.config.text.drop_path == 0.5


def test_a_frozen_text_tower_brings_its_whole_clip(tmp_path: Path) -> None:
    """FlexiLiT: a random text tower that never learns would teach nothing."""
    plain = make_task(Case("softmax", ()))
    frozen = make_task(Case("softmax", (), frozen=("text",)))
    for part in ("text.", "text_proj.", "image_proj.", "vision."):
        name = next(name for name, _ in frozen.model.named_parameters() if name.startswith(part))
        ours, theirs = (dict(task.model.named_parameters())[name] for task in (frozen, plain))
        assert not torch.equal(ours, theirs), "the weights are those of init"
    assert isinstance(frozen.model, CLIP)
    frozen.model.save_pretrained(tmp_path / "clip")
    config = replace(frozen.config, init=tmp_path / "clip")
    other = CaptionTokenizer.train(["quite", "other", "captions"], 290)
    with pytest.raises(ValueError, match="has another tokenizer"):
        check_tokenizer(frozen.model, config.init, other)
    other.save(tmp_path / "clip" / "tokenizer.json")
    check_tokenizer(frozen.model, config.init, other)
    assert given_tokenizer(config) == tmp_path / "clip" / "tokenizer.json"


def test_wrong_freezing_is_refused(weights: tuple[Path, NaViT]) -> None:
    folder, _ = weights
    with pytest.raises(ValueError, match="without init"):
        TrainConfig(freeze=("vision",))
    with pytest.raises(ValueError, match="must leave one of the towers"):
        TrainConfig(freeze=("vision", "text"), init=folder)
    with pytest.raises(ValueError, match="needs a text tower"):
        TrainConfig(task="classify", freeze=("text",), init=folder)
    with pytest.raises(ValueError, match=r"needs a CLIP in init.*holds a NaViT"):
        start_of_pair(run_of(folder, freeze=("text",)))
    with pytest.raises(ValueError, match=r"init_grid.*init given; got 4 and None"):
        TrainConfig(init_grid=4)
