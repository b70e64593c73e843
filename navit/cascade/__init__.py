"""Inference in stages of growing token budgets: tokens are spent where they are needed.

Solve thresholds on labelled images (`StageOutcomes`, a rule such as `BudgetSearch`), then give them
to a `Cascade`; ``navit evaluate --cascade`` does both and draws what it is worth.
"""

from navit.cascade.cascade import Cascade, CascadeOutput
from navit.cascade.cost import cascade_flops, expected_cost, stage_flops
from navit.cascade.outcomes import RandomRouting, StageOutcomes
from navit.cascade.run import Answer, CascadeRun, CascadeStats
from navit.cascade.stage import Stage, budget_stages, max_probability
from navit.cascade.thresholds import (
    AlphaFraction,
    BudgetSearch,
    CascadeThresholds,
    ExitFractions,
    GeometricExits,
    ThresholdRule,
)

__all__ = [
    "AlphaFraction",
    "Answer",
    "BudgetSearch",
    "Cascade",
    "CascadeOutput",
    "CascadeRun",
    "CascadeStats",
    "CascadeThresholds",
    "ExitFractions",
    "GeometricExits",
    "RandomRouting",
    "Stage",
    "StageOutcomes",
    "ThresholdRule",
    "budget_stages",
    "cascade_flops",
    "expected_cost",
    "max_probability",
    "stage_flops",
]
