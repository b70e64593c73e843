"""CLIP: the image and the text tower, projected into one space."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from navit.model.config import CLIPConfig
from navit.model.flexi import Flexible
from navit.model.text import TextTower
from navit.model.vision import NaViT, PretrainedModel
from packer.batch import PackedBatch, PackedText


@dataclass(frozen=True)
class CLIPOutput:
    """What a contrastive loss asks for; features have length 1, in float32 or better."""

    image: Float[Tensor, "N E"]
    """One vector per image."""
    text: Float[Tensor, "M E"]
    """One vector per caption."""
    logit_scale: Float[Tensor, ""]
    """The multiplier of the similarities itself, not its logarithm."""
    logit_bias: Float[Tensor, ""] | None
    """Added to the scaled similarities, for the sigmoid loss; None without one."""


class CLIP(Flexible, PretrainedModel[CLIPConfig]):
    """Two towers trained so that an image and its caption meet.

    Source: CLIP (arXiv:2103.00020, section 2.3), trained on packed images and packed text as in
    NaViT (arXiv:2307.06304, section 3, contrastive pretraining).
    """

    config_class = CLIPConfig

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.vision = NaViT(config.vision)
        self.text = TextTower(config.text)
        self.image_proj: nn.Module = nn.Identity()
        if config.image_projection:
            self.image_proj = nn.Linear(config.vision.width, config.embed_dim, bias=False)
        has_bias = config.text_projection_bias
        self.text_proj = nn.Linear(config.text.width, config.embed_dim, bias=has_bias)
        for layer in (self.image_proj, self.text_proj):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        if has_bias:
            nn.init.zeros_(self.text_proj.bias)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.init_logit_scale)))
        self.logit_bias: nn.Parameter | None = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.init_logit_bias))

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The multiplier of the similarities, at most `max_logit_scale`."""
        scale, bound = self.log_logit_scale.exp(), self.config.max_logit_scale
        return scale if bound is None else scale.clamp(max=bound)

    @torch.no_grad()
    def limit_logit_scale_(self) -> None:
        """Set a multiplier above `max_logit_scale` back to it; call after an optimizer step.

        Clamped in the forward pass alone it would get no gradient there and never come back.
        """
        if self.config.max_logit_scale is not None:
            self.log_logit_scale.clamp_(max=math.log(self.config.max_logit_scale))

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile both towers, as `NaViT.compile` says."""
        self.vision.compile(*args, **options)
        self.text.compile(*args, **options)

    def encode_image(self, batch: PackedBatch, *, normalize: bool = False) -> Float[Tensor, "N E"]:
        """Embed the images of a batch, in the order of its keys.

        Args:
            batch: The packed images.
            normalize: Whether to scale each vector to length 1, in float32 or better.
        """
        features: Tensor = self.image_proj(self.vision(batch).pooled)
        return _unit(features) if normalize else features

    def encode_text(
        self, captions: PackedText | PackedBatch, *, normalize: bool = False
    ) -> Float[Tensor, "M E"]:
        """Embed captions, in their order.

        Args:
            captions: Packed captions, or a batch that carries them.
            normalize: Whether to scale each vector to length 1, in float32 or better.

        Raises:
            ValueError: If the batch carries no captions.
        """
        if isinstance(captions, PackedBatch):
            if captions.captions is None:
                raise ValueError(
                    "The batch must carry captions; got captions=None. Pass a tokenizer where the "
                    "batch is packed."
                )
            captions = captions.captions
        features: Tensor = self.text_proj(self.text(captions))
        return _unit(features) if normalize else features

    def forward(self, batch: PackedBatch) -> CLIPOutput:
        """Embed the images and captions of a batch for a contrastive loss.

        Raises:
            ValueError: If the batch carries no captions.
        """
        return CLIPOutput(
            image=self.encode_image(batch, normalize=True),
            text=self.encode_text(batch, normalize=True),
            logit_scale=self.logit_scale,
            # Not the parameter itself: FSDP2 hooks what a forward pass returns, at every pass.
            logit_bias=None if self.logit_bias is None else self.logit_bias.clone(),
        )


def _unit(features: Tensor) -> Tensor:
    """Scale rows to length 1 outside of half precision."""
    if features.dtype != torch.float64:
        features = features.float()
    return F.normalize(features, dim=-1)
