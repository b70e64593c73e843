"""Where a model starts: from weights given or at random, some of them frozen."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from navit.model import CLIP, NaViT
from navit.model.classifier import Classifier
from navit.model.config import CLIPConfig, NaViTConfig
from navit.train.config import Tower, TrainConfig
from packer.plan.patch_size import OnePatchSize


def start_of_tower(config: TrainConfig) -> tuple[NaViTConfig, dict[str, Tensor] | None]:
    """Return the image tower's configuration and, with ``init``, the weights it starts from.

    Raises:
        ValueError: If the tower does not take patches of the packer's sizes.
    """
    ours, weights = replace(config.model.vision, patch_size=config.packer.patch_size), None
    if config.init is not None:
        tower = _initial_tower(config)
        # What follows from the run and not from the weights stays the run's.
        ours = replace(
            tower.config,
            patch_size=config.packer.patch_size,
            attention=ours.attention,
            checkpointing=ours.checkpointing,
            drop_path=ours.drop_path,
        )
        weights = tower.state_dict()
    if ours.patch_buffer is None and not isinstance(config.packer.patch_sizes, OnePatchSize):
        raise ValueError(
            "packer.patch_sizes draws several sizes, which needs a flexible tower; this one has "
            f"weights for patches of {ours.patch_size} pixels alone. Set "
            "--model.vision.patch-buffer 32."
        )
    if "vision" in config.freeze:
        ours = replace(ours, drop_path=0.0)  # a tower that does not learn is not regularised
    return ours, weights


def _initial_tower(config: TrainConfig) -> NaViT:
    """Read the tower of ``init``, made flexible and its grid resized where that is asked for."""
    from navit.train.restore import load_model  # restoring a run makes tasks

    assert config.init is not None, "the caller checks it"
    model = load_model(config.init)
    tower = model if isinstance(model, NaViT) else model.vision
    buffer, patch_size = config.model.vision.patch_buffer, config.packer.patch_size
    if buffer is not None and tower.config.patch_buffer != buffer:
        tower = tower.flexible(buffer)
    if config.init_grid is not None:
        tower = tower.at_grid(config.init_grid, "corners")
    if tower.config.patch_buffer is None and tower.config.patch_size != patch_size:
        raise ValueError(
            f"packer.patch_size must be that of the weights in {config.init} "
            f"({tower.config.patch_size}); got {patch_size}. Set --packer.patch-size "
            f"{tower.config.patch_size}, or make the tower flexible: --model.vision.patch-buffer "
            "32."
        )
    return tower


def start_of_scores(config: TrainConfig) -> CLIPConfig:
    """Return the configuration of a CLIP whose scores start as the loss asks for.

    Source: SigLIP (arXiv:2303.15343), section 3.2: scale 10 and bias -10, so that the many
    negatives cost little at the start. Its scale has no bound.
    """
    model = config.model
    if config.contrastive_loss != "sigmoid" or model.init_logit_bias is not None:
        return model
    return replace(model, init_logit_scale=10.0, max_logit_scale=None, init_logit_bias=-10.0)


def freeze(model: CLIP | Classifier, towers: Sequence[Tower]) -> None:
    """Keep the weights of towers, with their projections to the common space, as they are."""
    for name in towers:
        projections = {"vision": "image_proj", "text": "text_proj"}
        for part in (name, projections[name]):
            module = getattr(model, part, None)
            if module is not None:
                module.requires_grad_(requires_grad=False)
