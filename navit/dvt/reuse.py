"""What a stage takes from the one before: its tokens (feature reuse) and its attention logits.

The last matrix of every module starts at 0, so that at first each stage is the plain network and
learns how much of the other to use. The authors' modules start at random.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from navit.dvt.config import DVTConfig
from navit.dvt.resample import Grid, PackedResize, resize_relations
from navit.model.block import INIT_STD, make_norm
from navit.model.config import NaViTConfig
from navit.model.linear import Linear, linear_gelu


class BlockContext(nn.Module):
    """What one block reads of the stage before: layer norm, MLP, upsampling; and how it reads it.

    The channels join the input of the block's MLP, behind its layer norm: ``fc1 [norm2(x), c]``.
    The authors' layer norm spans x and c together; behind it a context of zeros leaves the block
    what it was, which a joint norm would not.
    """

    def __init__(self, config: DVTConfig) -> None:
        super().__init__()
        vision = config.vision
        self.norm = make_norm(vision)
        self.fc1 = Linear(vision.width, config.context_hidden, bias=vision.biases)
        self.fc2 = Linear(config.context_hidden, config.context_dim, bias=vision.biases)
        self.join = Linear(config.context_dim, vision.mlp_dim, bias=False)
        nn.init.normal_(self.fc1.weight, std=INIT_STD)
        nn.init.normal_(self.join.weight, std=INIT_STD)
        zero_output(self.fc2)

    def forward(
        self, tokens: Float[Tensor, "T D"], resize: PackedResize
    ) -> Float[Tensor, "S context"]:
        """Turn the T old tokens into a context for each of the S new ones."""
        hidden = linear_gelu(self.norm(tokens), self.fc1.weight, self.fc1.bias, "none")
        return resize(self.fc2(hidden))


class RelationReuse(nn.Module):
    """Attention logits of all layers and heads, mixed by one MLP and upsampled to a new grid.

    Layers and heads are channels of a picture of token pairs: the MLP is a pair of 1 x 1
    convolutions over it, applied before the upsampling, where pairs are fewer.
    """

    def __init__(self, config: DVTConfig) -> None:
        super().__init__()
        vision = config.vision
        self.depth, self.prefix = vision.depth, vision.num_prefix
        channels = vision.depth * vision.num_heads
        hidden = config.relation_ratio * channels
        self.fc1 = Linear(channels, hidden, bias=vision.biases)
        self.fc2 = Linear(hidden, channels, bias=vision.biases)
        zero_output(self.fc2)

    def forward(
        self, logits: Float[Tensor, "n channels S S"], old: Grid, new: Grid
    ) -> list[Float[Tensor, "n H S2 S2"]]:
        """Return what is added to the attention logits of each layer at the next stage.

        Args:
            logits: Of the L x H layers and heads, layer by layer, of n images of one grid.
            old: Their grid.
            new: Their grid at the next stage.
        """
        count, channels, size, _ = logits.shape
        pairs = logits.flatten(2).transpose(1, 2)
        mixed = self.fc2(linear_gelu(pairs, self.fc1.weight, self.fc1.bias, "none"))
        small = mixed.transpose(1, 2).reshape(count, channels, size, size)
        resized = resize_relations(small, old, new, prefix=self.prefix)
        return list(resized.chunk(self.depth, dim=1))


class Reuse(nn.Module):
    """The modules between two stages.

    Source: DVT (arXiv:2105.15075), section 3.2 "Feature and relationship reuse".
    """

    def __init__(self, config: DVTConfig) -> None:
        super().__init__()
        # Named as the tower's: their matrices are trained as a block's are.
        self.blocks = nn.ModuleList(
            BlockContext(config) for _ in range(config.vision.depth * config.feature_reuse)
        )
        self.relation = RelationReuse(config) if config.relation_reuse else None

    @torch.no_grad()
    def zero_(self) -> None:
        """Make the next stage ignore this one: set the last matrix of every module to 0."""
        for context in self.blocks:
            assert isinstance(context, BlockContext)
            zero_output(context.fc2)
        if self.relation is not None:
            zero_output(self.relation.fc2)


def zero_output(layer: nn.Linear) -> None:
    """Set a layer's weight and bias to 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def reuse_flops(config: DVTConfig, old: Grid, new: Grid) -> int:
    """Return the operations of the reuse modules for one image between two stages.

    Args:
        config: Which modules there are, and their sizes.
        old: The image's grid at the stage before.
        new: Its grid at this one.

    Returns:
        Two for each multiply-add of a matrix product and of the resizes.
    """
    vision = config.vision
    before, after = (vision.num_prefix + grid[0] * grid[1] for grid in (old, new))
    total = 0
    if config.feature_reuse:
        patches = old[0] * old[1]
        mlp = config.context_hidden * (vision.width + config.context_dim)
        per_token = config.context_dim * (4 + vision.mlp_dim)  # four taps, then the join
        total += 2 * vision.depth * (patches * mlp + after * per_token)
    if config.relation_reuse:
        total += 2 * _relation_products(vision, config.relation_ratio, old, new, before, after)
    return total


def _relation_products(
    vision: NaViTConfig, ratio: int, old: Grid, new: Grid, before: int, after: int
) -> int:
    """Multiply-adds of the MLP on every old pair, and of the resizes of keys, then queries."""
    channels = vision.depth * vision.num_heads
    mlp = before**2 * 2 * ratio * channels**2
    one_axis = old[0] * old[1] * new[1] + new[1] * old[0] * new[0]
    return mlp + channels * (before + after) * one_axis
