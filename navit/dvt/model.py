"""`DVT`: a vision transformer in stages, each with an exit, each standing on the one before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from navit.dvt.blocks import run_reusing
from navit.dvt.config import DVTConfig
from navit.dvt.embedded import (
    EmbeddedStage,
    check_stages,
    embed_stage,
    make_parts,
    token_places,
)
from navit.dvt.resample import Counts, Grid, plan_resize
from navit.dvt.reuse import BlockContext, Reuse
from navit.model.attention import AttentionPlan
from navit.model.prefix import plan_prefix
from navit.model.transfer import to_device
from navit.model.vision import NaViT, PretrainedModel
from packer.batch import PackedBatch


@dataclass(frozen=True, eq=False)
class Carried:
    """What a stage hands to the next: its images' last tokens and attention logits."""

    images: Counts
    """Which images, in the order of the tokens."""
    grids: tuple[Grid, ...]
    """Their grids at that stage."""
    tokens: Float[Tensor, "T D"]
    """Output of the last block, without class token and registers, before the last norm."""
    logits: Float[Tensor, "n channels S S"] | None
    """Attention logits of all layers and heads; None without relationship reuse."""

    @property
    def lengths(self) -> Counts:
        """Tokens of each image."""
        return np.asarray([rows * cols for rows, cols in self.grids], dtype=np.int64)

    def select(self, keep: Counts) -> "Carried":
        """Return what belongs to some of the images, by their place here."""
        lengths, device = self.lengths, self.tokens.device
        places = token_places((np.cumsum(lengths) - lengths)[keep], lengths[keep])
        return Carried(
            self.images[keep],
            tuple(self.grids[i] for i in keep.tolist()),
            self.tokens.index_select(0, to_device(places, device)),
            None if self.logits is None else self.logits.index_select(0, to_device(keep, device)),
        )


@dataclass(frozen=True, eq=False)
class DVTExits:
    """Where the N images of a batch left, and with what."""

    logits: Float[Tensor, "N C"]
    """Class logits of the exit each image took, float32."""
    stages: Int64[Tensor, " N"]
    """Stage of that exit, from 0."""


class DVT(PretrainedModel[DVTConfig]):
    """K stages over the same images at growing token budgets, each with a classifier as its exit.

    From the second on, a stage reads the last tokens of the stage before in the MLP of every block
    (feature reuse) and adds its attention logits, upsampled, to its own (relationship reuse).

    Feature reuse alone runs packed: block-diagonal attention over all images of a batch, each new
    token reading four old ones. Relationship reuse runs in buckets of images with equal grids at
    every stage, each bucket through all stages before the next: at inference the logits of one
    bucket, of at most `DVTConfig.max_logits` values at its largest stage (or one image's), are
    kept. With the copies that the MLP and the resizes make, 5 to 6 times as much was measured at
    the peak. In training autograd keeps those of all buckets, unless the tower's ``checkpointing``
    is on; they are then those of one bucket again, computed twice.

    The tower runs in float32 or under autocast; it is not compiled.

    Source: DVT (arXiv:2105.15075), sections 3.1 and 3.2. Packing, grids of native aspect, and one
    tower for all stages (``shared``) are ours.
    """

    config_class = DVTConfig

    def __init__(self, config: DVTConfig) -> None:
        super().__init__(config)
        towers = 1 if config.shared else config.num_stages
        self.towers = nn.ModuleList(NaViT(config.vision) for _ in range(towers))
        self.heads = nn.ModuleList(
            nn.Linear(config.vision.width, config.num_classes) for _ in range(config.num_stages)
        )
        self.reuse = nn.ModuleList(Reuse(config) for _ in range(config.num_stages - 1))
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def tower(self, stage: int) -> NaViT:
        """Return the tower of a stage, from 0."""
        tower = self.towers[0 if self.config.shared else stage]
        assert isinstance(tower, NaViT)
        return tower

    def forward(self, batches: Sequence[PackedBatch]) -> tuple[Float[Tensor, "N C"], ...]:
        """Return every exit's logits of each image, in the order of the batches' keys.

        Args:
            batches: The same images, packed for each stage, cheapest first; for the first stages
                alone where there are fewer than K.

        Raises:
            ValueError: If the batches differ in their keys, or hold images of which tokens were
                dropped.
        """
        stages = self._embed(batches)
        if not batches[0].num_images:
            return tuple(self._no_images(stage, k) for k, stage in enumerate(stages))
        parts = self._parts(stages)
        again = self.config.vision.checkpointing and self.config.relation_reuse
        found = []
        for images in parts:
            if again and torch.is_grad_enabled():
                found.append(checkpoint(self._run_part, stages, images, use_reentrant=False))
            else:
                found.append(self._run_part(stages, images))
        place = to_device(np.argsort(np.concatenate(parts)), found[0][0].device)
        columns = zip(*found, strict=True)
        return tuple(torch.cat(column).index_select(0, place) for column in columns)

    @torch.no_grad()
    def exits(self, batches: Sequence[PackedBatch], thresholds: Sequence[float]) -> DVTExits:
        """Let each image leave at the first stage that is sure of it; the others go on.

        Args:
            batches: As for `forward`, one for each of K stages.
            thresholds: K - 1 values; an image leaves where its largest probability reaches its
                stage's. The last stage keeps what it gets.

        Raises:
            ValueError: As `forward`, and if there is not one threshold less than batches.
        """
        if len(thresholds) != len(batches) - 1:
            raise ValueError(
                f"There must be one threshold less than batches; got {len(thresholds)} for "
                f"{len(batches)}."
            )
        stages = self._embed(batches)
        device, count = stages[0].x.device, batches[0].num_images
        logits = torch.zeros(count, self.config.num_classes, device=device)
        left_at = np.zeros(count, dtype=np.int64)
        for part in self._parts(stages) if count else []:
            images, carried = part, None
            for k, stage in enumerate(stages):
                answers, carried = self.run_stage(k, stage, images, carried)
                # Rows in the order of `images`; what is overwritten later was not sure.
                logits[to_device(images, device)] = answers.to(logits.dtype)
                left_at[images] = k
                if k == len(thresholds):
                    break
                sure = answers.softmax(-1).amax(-1) >= thresholds[k]
                waiting = np.flatnonzero(~sure.cpu().numpy())
                images = images[waiting]
                if not len(images):
                    break
                carried = carried.select(places_of(carried.images, images))
        return DVTExits(logits, to_device(left_at, device))

    def _embed(self, batches: Sequence[PackedBatch]) -> list[EmbeddedStage]:
        check_stages(batches, self.config.num_stages)
        return [embed_stage(self.tower(k), batch) for k, batch in enumerate(batches)]

    def _parts(self, stages: Sequence[EmbeddedStage]) -> list[Counts]:
        config = self.config
        channels = config.vision.depth * config.vision.num_heads
        return make_parts(
            stages,
            bucketed=config.relation_reuse,
            prefix=config.vision.num_prefix,
            max_pairs=config.max_logits // channels,
        )

    def _no_images(self, stage: EmbeddedStage, k: int) -> Float[Tensor, "0 C"]:
        """Return the logits of no image, connected to every parameter."""
        nothing = sum(0 * parameter.sum() for parameter in self.parameters())
        empty: Tensor = self.heads[k](stage.x.new_zeros(0, self.config.vision.width))
        return empty + nothing

    def _run_part(
        self, stages: Sequence[EmbeddedStage], images: Counts
    ) -> tuple[Float[Tensor, "n C"], ...]:
        """Run some images through all stages."""
        found, carried = [], None
        for k, stage in enumerate(stages):
            logits, carried = self.run_stage(k, stage, images, carried)
            found.append(logits)
        return tuple(found)

    def run_stage(
        self, k: int, stage: EmbeddedStage, images: Counts, carried: Carried | None
    ) -> tuple[Float[Tensor, "n C"], Carried]:
        """Run some images through one stage.

        Args:
            k: The stage, from 0.
            stage: Their tokens.
            images: Which of its images; with relationship reuse all of one grid, and of one grid
                at the stage before.
            carried: What the stage before handed on, of these images or more; None at the first.

        Returns:
            (logits in the order of ``images``, what is handed on).
        """
        config, tower = self.config, self.tower(k)
        order = images[np.argsort(stage.lengths[images], kind="stable")]
        grids = tuple(stage.grids[image] for image in order.tolist())
        plan = AttentionPlan(tuple(stage.lengths[order].tolist()), stage.x.device, stage.backend)
        prefix = plan_prefix(plan, config.vision.num_prefix) if config.vision.num_prefix else None
        x = stage.of(order)
        if prefix is not None:
            x = tower.prefix.add(x, prefix)
        contexts, biases = self._reused(k, order, grids, carried)
        x, logits = run_reusing(
            tower.blocks,
            tower.pre_norm(x),
            plan if prefix is None else prefix.attention,
            dense=config.relation_reuse,
            biases=biases,
            contexts=contexts,
            keep_logits=config.relation_reuse and k + 1 < config.num_stages,
            checkpointing=config.vision.checkpointing and not config.relation_reuse,
        )
        added, x = (None, x) if prefix is None else tower.prefix.split(x, prefix)
        answers = self.heads[k](_pool(tower, x, added, plan))
        relations = torch.cat(logits, dim=1) if logits else None
        answers = answers.index_select(0, to_device(places_of(order, images), answers.device))
        return answers, Carried(order, grids, x, relations)

    def _reused(
        self, k: int, order: Counts, grids: tuple[Grid, ...], carried: Carried | None
    ) -> tuple[list[tuple[BlockContext, Tensor]], list[Tensor] | None]:
        """Make each block's context, and what is added to each layer's attention logits."""
        contexts: list[tuple[BlockContext, Tensor]] = []
        if carried is None:
            return contexts, None
        reuse = self.reuse[k - 1]
        assert isinstance(reuse, Reuse)
        if len(reuse.blocks):
            place = places_of(carried.images, order)
            resize = plan_resize(
                [carried.grids[i] for i in place.tolist()],
                grids,
                (np.cumsum(carried.lengths) - carried.lengths)[place],
                prefix=self.config.vision.num_prefix,
                device=carried.tokens.device,
            )
            for module in reuse.blocks:
                assert isinstance(module, BlockContext)
                contexts.append((module, module(carried.tokens, resize)))
        if reuse.relation is None:
            return contexts, None
        # All images of a bucket have one grid at each stage, so their order is the same.
        assert carried.logits is not None
        return contexts, reuse.relation(carried.logits, carried.grids[0], grids[0])


def places_of(order: Counts, images: Counts) -> Counts:
    """Return where each of ``images`` is in ``order``."""
    sorting = np.argsort(order)
    places: Counts = sorting[np.searchsorted(order, images, sorter=sorting)]
    return places


def _pool(
    tower: NaViT, x: Float[Tensor, "T D"], added: Tensor | None, plan: AttentionPlan
) -> Float[Tensor, "n D"]:
    """Turn the last block's tokens into a vector for each image, as `NaViT.encode` does."""
    late = tower.config.norm_after_pool
    vectors: Tensor
    if tower.pool is None:
        assert added is not None, "pool 'cls' adds a class token"
        vectors = added[:, 0]
    else:
        vectors = tower.pool(x if late else tower.norm(x), plan)
        if not late:
            return vectors
    normed: Tensor = tower.norm(vectors)
    return normed
