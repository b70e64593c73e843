"""A look inside a checkpoint: `navit analyze`, and each analysis as a function."""

from navit.analyze.cka import MinibatchCka, linear_cka
from navit.analyze.distance import attention_distance
from navit.analyze.filters import filter_components
from navit.analyze.positions import position_similarity
from navit.analyze.rollout import attention_rollout

__all__ = [
    "MinibatchCka",
    "attention_distance",
    "attention_rollout",
    "filter_components",
    "linear_cka",
    "position_similarity",
]
