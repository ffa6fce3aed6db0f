"""Costs in closed form, with the standard library alone: so far, the published scaling laws."""

from moe_course.costs.scaling import (
    CLARK,
    ClarkLaw,
    clark_loss,
    effective_parameters,
    krajewski_dense_loss,
    krajewski_loss,
)

__all__ = [
    "CLARK",
    "ClarkLaw",
    "clark_loss",
    "effective_parameters",
    "krajewski_dense_loss",
    "krajewski_loss",
]
