"""NaViT: packed images in, one vector per image out."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from navit.model.attention import (
    AttentionPlan,
    compute_dtype,
    order_by_length,
)
from navit.model.backends import resolve_backend
from navit.model.block import make_blocks, make_norm, run_blocks
from navit.model.compile import CompiledTower
from navit.model.config import ModelConfig, NaViTConfig
from navit.model.flexi import Flexible
from navit.model.flexi_embed import FlexiPatchEmbed, PatchGroups, group_patches
from navit.model.patch_embed import PatchEmbed
from navit.model.pool import make_pool
from navit.model.pos_embed import make_pos_embed
from navit.model.prefix import PrefixPlan, PrefixTokens, plan_prefix
from navit.model.stem import ConvStem, GridGroups, group_grids
from navit.model.transfer import to_device
from packer.batch import PackedBatch

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


C = TypeVar("C", bound=ModelConfig)
M = TypeVar("M", bound="PretrainedModel[Any]")


class PretrainedModel(nn.Module, Generic[C]):
    """A model that can be written to a folder and read back: safetensors beside a config.json."""

    config_class: type[C]

    def __init__(self, config: C) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, making it if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described = {"model": type(self).__name__, "config": self.config.to_dict()}
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(cls: type[M], folder: str | Path) -> M:
        """Read a model as `save_pretrained` wrote it, in the types its weights were saved in.

        Raises:
            FileNotFoundError: If the folder lacks one of the two files.
            ValueError: If the folder holds another kind of model.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}, as save_pretrained "
                    f"writes them; {name} is missing."
                )
        described = json.loads((folder / CONFIG_FILE).read_text())
        if described.get("model") != cls.__name__:
            raise ValueError(
                f"{folder} must hold a {cls.__name__}; got {described.get('model')!r}. "
                f"Read it with {described.get('model')}.from_pretrained."
            )
        model = cls(cls.config_class.from_dict(described["config"]))
        # safetensors' memory is not aligned as torch's is: a clone takes the same kernels, hence
        # gives the same bits, as the model that was saved.
        weights = {name: value.clone() for name, value in load_file(folder / WEIGHTS_FILE).items()}
        model.load_state_dict(weights, assign=True)
        return model


@dataclass(frozen=True)
class TokenPlan:
    """Where the T real tokens of a batch are and which image each belongs to.

    Made on the host from `segment_lengths` and `segment_images`: nothing waits for the device.
    """

    attention: AttentionPlan
    """The segments of the N images, sorted by length."""
    token_index: Int64[Tensor, " T"]
    """Place of each token among the B * L flattened places."""
    image_place: Int64[Tensor, " N"]
    """Which of the sorted segments is the i-th image."""
    prefix: PrefixPlan | None = None
    """Where class token and registers go; None without them."""
    patches: PatchGroups | GridGroups | None = None
    """The tokens by the size of their patches, None where there is one size; with a convolutional
    stem by the grid of their image, None where there is no image."""


def plan_tokens(
    batch: PackedBatch, config: NaViTConfig, *, dtype: torch.dtype, compiled: bool = False
) -> TokenPlan:
    """Plan a forward pass: drop the padding, sort the images by length.

    Args:
        batch: The packed images.
        config: Names the attention backend and the head size.
        dtype: Type of the model's weights; autocast's type counts where it is on.
        compiled: Whether a compiled model asks.
    """
    device = batch.patches.device
    images = np.asarray(batch.segment_images, dtype=np.int64)
    lengths, order, tokens = order_by_length(batch.segment_lengths, (images >= 0).tolist())
    backend = resolve_backend(
        config.attention,
        device=device,
        dtype=compute_dtype(device, dtype),
        head_dim=config.head_dim,
        compiled=compiled,
    )
    plan = AttentionPlan(lengths, device, backend)
    groups: PatchGroups | GridGroups | None = None
    if config.stem is not None and lengths:
        groups = group_grids([batch.segment_grids[segment] for segment in order], device)
    elif batch.patch_sizes is not None and lengths:
        sizes = np.asarray(batch.segment_patch_sizes)[order]
        groups = group_patches(tuple(sizes.tolist()), lengths, device)
    return TokenPlan(
        attention=plan,
        token_index=to_device(tokens, device),
        image_place=to_device(np.argsort(images[order]), device),
        prefix=plan_prefix(plan, config.num_prefix) if config.num_prefix else None,
        patches=groups,
    )


def gather_positions(
    batch: PackedBatch, plan: TokenPlan
) -> tuple[Int32[Tensor, "T 2"], Int32[Tensor, "T 2"]]:
    """Return (row, col) of each real token and (rows, cols) of its image, in the plan's order."""
    index, slots = plan.token_index, batch.grid_sizes.shape[1]
    positions = batch.position_ids.flatten(0, 1).index_select(0, index)
    segment = batch.segment_ids.flatten().index_select(0, index)
    slot = index // max(batch.seq_len, 1) * slots + segment - 1
    return positions, batch.grid_sizes.flatten(0, 1).index_select(0, slot)


class ImageTokens(NamedTuple):
    """The tokens of one image, as dense features."""

    tokens: Float[Tensor, "*place D"]
    """(rows, cols, D) where no token was dropped, else (n, D) in the order of `positions`."""
    positions: Int32[Tensor, "n 2"]
    """(row, col) of each token in the image's grid."""
    grid: tuple[int, int]
    """(rows, cols) before dropping."""

    @property
    def is_complete(self) -> bool:
        """Whether every patch of the grid has its token."""
        return len(self.positions) == self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class NaViTOutput:
    """What the image tower returns for a batch of N images and T tokens in B x L places."""

    pooled: Float[Tensor, "N D"]
    """One vector per image, in the order of the batch's keys."""
    packed_tokens: Float[Tensor, "T D"]
    """The tokens after the last norm, in the plan's order, without padding; with `norm_after_pool`
    before it."""
    plan: TokenPlan
    """Where the packed tokens belong."""
    shape: tuple[int, int]
    """(B, L)."""
    packed_positions: Int32[Tensor, "T 2"]
    """(row, col) of each packed token."""
    packed_grids: Int32[Tensor, "T 2"]
    """(rows, cols) of each packed token's image."""

    @cached_property
    def tokens(self) -> Float[Tensor, "B L D"]:
        """The tokens in their places, 0 in padding; made when first asked for."""
        places = self.packed_tokens.new_zeros(self.shape[0] * self.shape[1], self.width)
        placed = places.index_copy(0, self.plan.token_index, self.packed_tokens)
        return placed.view(*self.shape, self.width)

    def per_image(self) -> list[ImageTokens]:
        """Return the tokens of each image, in the order of the batch's keys.

        Reads grids and places back to the host, hence waits for the device.
        """
        lengths = list(self.plan.attention.lengths)
        tokens, positions = (
            x.split_with_sizes(lengths) for x in (self.packed_tokens, self.packed_positions)
        )
        starts = np.cumsum([0, *lengths])[:-1]
        grids = self.packed_grids[to_device(starts, self.packed_grids.device)].tolist()
        found = []
        for place in self.plan.image_place.tolist():
            image = ImageTokens(tokens[place], positions[place], tuple(grids[place]))
            if image.is_complete:  # kept tokens are in rising order, so these are all, row by row
                image = image._replace(tokens=image.tokens.view(*image.grid, -1))
            found.append(image)
        return found

    @property
    def width(self) -> int:
        """D."""
        return self.packed_tokens.shape[1]


def make_patch_embed(config: NaViTConfig) -> PatchEmbed | FlexiPatchEmbed | ConvStem:
    """Return the patch embedding, or convolutional stem, that the configuration names."""
    if config.stem is not None:
        return ConvStem(config)
    settings: dict[str, Any] = {
        "bias": config.biases if config.patch_bias is None else config.patch_bias,
        "mean": config.pixel_mean,
        "std": config.pixel_std,
    }
    if config.patch_buffer is not None:
        return FlexiPatchEmbed(config.patch_buffer, config.width, **settings)
    return PatchEmbed(config.patch_size, config.width, **settings)


class NaViT(Flexible, CompiledTower, PretrainedModel[NaViTConfig]):
    """The vision transformer of NaViT: native-resolution images, packed into sequences.

    An image gives the same vector, and the same gradients, packed with any others or alone.

    Source: NaViT (arXiv:2307.06304), section 2.1; block as in ViT (arXiv:2010.11929) with the
    query-key norm of ViT-22B (arXiv:2302.05442) and no biases.
    """

    config_class = NaViTConfig

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__(config)
        self.patch_embed = make_patch_embed(config)
        self.pos_embed = make_pos_embed(config)
        self.prefix = PrefixTokens(config)
        self.pre_norm = make_norm(config) if config.pre_norm else nn.Identity()
        self.blocks = make_blocks(config)
        self.norm = make_norm(config)
        self.pool = None if config.pool == "cls" else make_pool(config)

    def forward(
        self, batch: PackedBatch, *, edit: Callable[[Tensor, TokenPlan], Tensor] | None = None
    ) -> NaViTOutput:
        """Encode a packed batch on the device its tensors are on.

        Args:
            batch: The packed images.
            edit: Changes the embedded patches (T, D), in the plan's order, before their positions
                are added; None leaves them.

        Raises:
            ValueError: If the batch's patch size is not that of a model that has but one, an image
                lacks tokens that a convolutional stem needs, or the attention backend asked for
                cannot run here.
        """
        self.patch_embed.check_patches(batch)
        dtype = self.norm.weight.dtype
        plan = plan_tokens(batch, self.config, dtype=dtype, compiled=self.is_compiled)
        positions, grids = gather_positions(batch, plan)
        if isinstance(self.patch_embed, PatchEmbed) and edit is None:  # part of what `encode` does
            patches = batch.patches.flatten(0, 1).index_select(0, plan.token_index)
        else:
            # Outside of a compiled graph, which would be made anew for each set of sizes or grids.
            patches = self.embed_patches(batch, plan)
            patches = patches if edit is None else edit(patches, plan)
        longer = plan.attention if plan.prefix is None else plan.prefix.attention
        encode = self.graph(plan.attention, longer)
        pooled, tokens = encode(patches, positions, grids, plan)
        return NaViTOutput(
            pooled=pooled,
            packed_tokens=tokens,
            plan=plan,
            shape=(batch.segment_ids.shape[0], batch.seq_len),
            packed_positions=positions,
            packed_grids=grids,
        )

    def embed_patches(self, batch: PackedBatch, plan: TokenPlan) -> Float[Tensor, "T D"]:
        """Embed the real tokens of a batch, without their positions, in the plan's order."""
        if isinstance(self.patch_embed, PatchEmbed):
            patches = batch.patches.flatten(0, 1).index_select(0, plan.token_index)
            vectors: Tensor = self.patch_embed(patches)
        else:
            vectors = self.patch_embed(batch, plan.token_index, plan.patches)
        return vectors

    def encode(
        self,
        patches: UInt8[Tensor, "T P"] | Float[Tensor, "T D"],
        positions: Int32[Tensor, "T 2"],
        grids: Int32[Tensor, "T 2"],
        plan: TokenPlan,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "T D"]]:
        """Turn patches into (a vector for each image, its tokens): all that runs on the device.

        A flexible tower, one with a convolutional stem and an ``edit`` give them embedded.
        """
        embedded = patches.is_floating_point()
        x = patches if embedded else self.patch_embed(patches)
        x = x + self.pos_embed(positions, grids)
        attention, prefix = plan.attention, None
        if plan.prefix is not None:
            attention, x = plan.prefix.attention, self.prefix.add(x, plan.prefix)
        x = run_blocks(self.blocks, self.pre_norm(x), attention, self.config.checkpointing)
        if not self.config.norm_after_pool:
            x = self.norm(x)
        if plan.prefix is not None:
            prefix, x = self.prefix.split(x, plan.prefix)
        if self.pool is None:
            assert prefix is not None, "pool 'cls' adds a class token"
            vectors: Tensor = prefix[:, 0]
        else:
            vectors = self.pool(x, plan.attention)
        if self.config.norm_after_pool:
            vectors = self.norm(vectors)
        return vectors.index_select(0, plan.image_place), x
