"""Native-resolution images packed into dense token sequences: the data side of NaViT."""

from packer.batch import BatchStats, PackedBatch, PackedText
from packer.captions import CaptionTokenizer
from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.dataset import PackedDataset
from packer.errors import SkipSample, TooManyFailures
from packer.lockstep import in_step
from packer.pack import pack
from packer.plan.drop import BetaDrop, ConstantDrop, NoDrop, ResolutionDrop, ScheduledDrop
from packer.plan.patch_size import OnePatchSize, RandomPatchSize, ScheduledPatchSize
from packer.plan.place import Placement
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
from packer.shards import write_shards
from packer.stream import LoaderState, PackedStream
from packer.tally import tally_text
from packer.transforms import ColorJitter, Compose, RandomFlip

__all__ = [
    "BatchStats",
    "BetaDrop",
    "CaptionTokenizer",
    "ColorJitter",
    "Compose",
    "ConstantDrop",
    "FixedSide",
    "LoaderState",
    "Native",
    "NoCrop",
    "NoDrop",
    "NormalArea",
    "NormalSide",
    "OnePatchSize",
    "PackedBatch",
    "PackedDataset",
    "PackedStream",
    "PackedText",
    "PackerConfig",
    "PackingCollator",
    "Placement",
    "RandomCrop",
    "RandomFlip",
    "RandomPatchSize",
    "ResolutionDrop",
    "ScheduledDrop",
    "ScheduledPatchSize",
    "SkipSample",
    "TooManyFailures",
    "UniformArea",
    "UniformSide",
    "in_step",
    "pack",
    "tally_text",
    "write_shards",
]
