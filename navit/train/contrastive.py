"""Image-text pairs as a task."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from navit.distill_loss import contrastive_distillation
from navit.evaluate.encode import read_metadata
from navit.evaluate.prompts import class_label
from navit.evaluate.run import Evaluation, evaluate_clip
from navit.loss import contrastive_loss, sigmoid_loss
from navit.model import CLIP
from navit.model.clip import CLIPOutput
from navit.train.config import TrainConfig
from navit.train.data import StreamData, TrainData
from navit.train.ranks import World
from navit.train.setup import tokenizer_of_all
from navit.train.start import freeze, start_of_pair, start_of_scores, start_of_tower
from navit.train.teacher import Teacher, check_tokenizer, given_tokenizer, mixed_loss, teacher_files
from packer.batch import PackedBatch

SHAPE_SHARDS = 32
"""Training shards read for the shape-only baseline: thousands of samples are enough for it."""


class ContrastiveTask:
    """Image-text pairs: a CLIP, trained so that an image and its caption meet."""

    couples_images = True

    def __init__(
        self, config: TrainConfig, run: Path, train_shards: Sequence[str], world: World
    ) -> None:
        self.run, self.train_shards, self.world = run, train_shards, world
        if config.tokenizer is None:
            config = replace(config, tokenizer=given_tokenizer(config))
        self.tokenizer = tokenizer_of_all(config, run, train_shards, world)
        text = replace(
            config.model.text,
            vocab_size=self.tokenizer.vocab_size,
            max_tokens=config.packer.max_text_tokens,
        )
        pair = start_of_pair(config)
        vision, weights = start_of_tower(config, pair)
        model = replace(start_of_scores(config), vision=vision, text=text)
        if pair is not None:
            check_tokenizer(pair, config.init, self.tokenizer)
            own = replace(pair.config.text, attention=text.attention, drop_path=0.0)
            bias = pair.config.init_logit_bias
            if bias is None:  # a sigmoid loss needs one, and starts it as it would alone
                bias = model.init_logit_bias
            model = replace(pair.config, vision=vision, text=own, init_logit_bias=bias)
        self.config = replace(config, model=model)
        torch.manual_seed(config.seed)
        self.model = CLIP(self.config.model)
        if pair is not None:
            self.model.load_state_dict({**self.model.state_dict(), **pair.state_dict()})
        elif weights is not None:
            self.model.vision.load_state_dict(weights)
        freeze(self.model, config.freeze)
        self.teacher = None if config.teacher is None else Teacher(self.config, world.device)
        if self.teacher is not None:
            check_tokenizer(self.teacher.model, config.teacher, self.tokenizer)

    @property
    def source(self) -> str:
        """The number of shards."""
        return f"{len(self.train_shards)} shards"

    def make_data(self, shards: Sequence[str], stored: Mapping[str, Any] | None) -> TrainData:
        """Stream the pairs of the shards."""
        kind: dict[str, Any] = {"need": "caption", "tokenizer": self.tokenizer}
        return StreamData(self.config, shards, self.world, **kind, stored=stored)

    def loss(
        self,
        output: CLIPOutput | Tensor,
        batches: Sequence[PackedBatch],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Return the contrastive loss; equal captions are not negatives of the softmax.

        With a teacher, how far the two models' similarities are from each other, mixed with it.
        """
        assert isinstance(output, CLIPOutput), "the model is a CLIP"
        own = partial(self._own_loss, output, batches, group)
        if self.teacher is None:
            return own()
        taught, config = self.teacher(batches), self.config
        assert isinstance(taught, CLIPOutput), "the teacher is a CLIP"
        with torch.autocast(output.image.device.type, enabled=False):
            agreed = contrastive_distillation(
                *(output.image, output.text, output.logit_scale),
                *(taught.image, taught.text, taught.logit_scale),
                kl=config.distill_kl,
                chunk_size=config.loss_chunk,
                group=group,
            )
        return mixed_loss(agreed, own, config.distill_weight)

    def _own_loss(
        self, output: CLIPOutput, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None
    ) -> Tensor:
        image, text, scale, bias = output.image, output.text, output.logit_scale, output.logit_bias
        chunk_size = self.config.loss_chunk
        with torch.autocast(image.device.type, enabled=False):
            if self.config.contrastive_loss == "sigmoid":
                assert bias is not None, "start_of_scores gives the sigmoid its bias"
                return sigmoid_loss(image, text, scale, bias, chunk_size=chunk_size, group=group)
            ids = text_ids([caption for batch in batches for caption in batch.texts or ()])
            ids = ids.to(image.device, non_blocking=True)
            return contrastive_loss(
                image, text, scale, chunk_size=chunk_size, text_ids=ids, group=group
            )

    def after_step(self) -> None:
        """Bound the multiplier of the similarities."""
        self.model.limit_logit_scale_()

    def evaluate(
        self,
        model: CLIP,
        shards: Sequence[str],
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> Evaluation:
        """Measure retrieval and caption-prompt accuracy."""
        return evaluate_clip(
            model,
            self.tokenizer,
            shards,
            self.config.packer,
            sequences_per_batch=self.config.sequences_per_batch,
            device=device,
            autocast_dtype=autocast_dtype,
            train_metadata=self._shape_metadata(tuple(shards)),
            progress=False,
        )

    def readings(self) -> Mapping[str, float]:
        """Return the multiplier of the similarities, and their bias where there is one."""
        found = {"logit_scale": float(self.model.logit_scale.detach())}
        if self.model.logit_bias is not None:
            found["logit_bias"] = float(self.model.logit_bias.detach())
        return found

    def files(self) -> dict[str, str]:
        """Return the tokenizer, and the digest of a teacher."""
        own = {"tokenizer.json": (self.run / "tokenizer.json").read_text()}
        return own | teacher_files(self.teacher)

    def _shape_metadata(self, shards: tuple[str, ...]) -> dict[str, dict[str, Any]] | None:
        """Json of training samples for the shape-only baseline; None where there are no classes."""
        if not any(class_label(fields) for fields in read_metadata(shards).values()):
            return None
        return self._train_metadata

    @cached_property
    def _train_metadata(self) -> dict[str, dict[str, Any]]:
        return read_metadata(self.train_shards[:SHAPE_SHARDS])


def text_ids(texts: Sequence[str]) -> Int64[Tensor, " N"]:
    """Number captions so that equal ones share a number, on every rank and in every batch.

    The numbers are the first 64 bits of a digest: of a million captions two different ones share
    one with a probability of 3e-8.
    """
    digests = b"".join(
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        for text in texts
    )
    return torch.from_numpy(np.frombuffer(digests, dtype="<i8").astype(np.int64))
