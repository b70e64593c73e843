"""Where a model starts: from weights given or at random, some of them frozen."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from navit.model import CLIP, NaViT
from navit.model.classifier import Classifier
from navit.model.config import CLIPConfig, NaViTConfig
from navit.train.config import Tower, TrainConfig
from packer.plan.drop import NoDrop
from packer.plan.patch_size import OnePatchSize


def start_of_tower(
    config: TrainConfig, pair: CLIP | None = None
) -> tuple[NaViTConfig, dict[str, Tensor] | None]:
    """Return the image tower's configuration and, with ``init``, the weights it starts from.

    Args:
        config: The run.
        pair: What `start_of_pair` has read of ``init``.

    Raises:
        ValueError: If the tower does not take patches of the packer's sizes, or has a convolutional
            stem where tokens are dropped.
    """
    ours, weights = replace(config.model.vision, patch_size=config.packer.patch_size), None
    if config.init is not None:
        model = _initial(config) if pair is None else pair
        tower = model if isinstance(model, NaViT) else model.vision
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
    if ours.stem is not None and not isinstance(config.packer.token_drop, NoDrop):
        raise ValueError(
            "a convolutional stem needs every image whole, and packer.token_drop drops tokens; got "
            f"stem={ours.stem!r}. Set packer.token-drop:no-drop."
        )
    if "vision" in config.freeze:
        ours = replace(ours, drop_path=0.0)  # a tower that does not learn is not regularised
    return ours, weights


def start_of_pair(config: TrainConfig) -> CLIP | None:
    """Return the CLIP a run with a frozen text tower starts from; None where it has none.

    Raises:
        ValueError: If ``init`` holds no CLIP, or one whose captions are shorter than the run's.
    """
    if "text" not in config.freeze:
        return None
    model = _initial(config)
    if not isinstance(model, CLIP):
        raise ValueError(
            f"freeze 'text' needs a CLIP in init, for its text tower; {config.init} holds a "
            f"{type(model).__name__}."
        )
    longest = model.config.text.max_tokens
    if longest < config.packer.max_text_tokens:
        raise ValueError(
            f"packer.max_text_tokens must be at most that of the frozen text tower ({longest}); "
            f"got {config.packer.max_text_tokens}."
        )
    return model


def _initial(config: TrainConfig) -> CLIP | Classifier | NaViT:
    """Read ``init``, its tower made flexible and its grid resized where that is asked for."""
    from navit.train.restore import load_model  # restoring a run makes tasks

    assert config.init is not None, "the caller checks it"
    model = load_model(config.init)
    tower = model if isinstance(model, NaViT) else model.vision
    buffer, patch_size = config.model.vision.patch_buffer, config.packer.patch_size
    own = tower.config.patch_size
    flexible = tower.config.patch_buffer is not None
    if buffer is not None and tower.config.patch_buffer != buffer:
        model, flexible = model.flexible(buffer), True
    if config.init_grid is not None:
        model = model.at_grid(config.init_grid, "corners")
    if not flexible and own != patch_size:
        raise ValueError(
            f"packer.patch_size must be that of the weights in {config.init} ({own}); got "
            f"{patch_size}. Set --packer.patch-size {own}, or make the tower flexible: "
            "--model.vision.patch-buffer 32."
        )
    return model


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
    """Keep the weights of towers as they are."""
    for name in towers:
        getattr(model, name).requires_grad_(requires_grad=False)
