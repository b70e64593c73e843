"""Dynamic vision transformers in packed form: stages that reuse each other's tokens and attention.

`navit.cascade` runs any networks one after another; here a stage stands on what the one before has
found out. Source: DVT (arXiv:2105.15075).
"""

from navit.dvt.collate import StagedCollator
from navit.dvt.config import DVTConfig
from navit.dvt.flops import dvt_flops
from navit.dvt.infer import classify
from navit.dvt.loss import exits_loss
from navit.dvt.model import DVT, DVTExits
from navit.dvt.reuse import reuse_flops

__all__ = [
    "DVT",
    "DVTConfig",
    "DVTExits",
    "StagedCollator",
    "classify",
    "dvt_flops",
    "exits_loss",
    "reuse_flops",
]
