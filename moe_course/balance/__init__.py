"""Load balancing: losses, the bias, metrics. Capacity is where slots are made, in `moe_course.layers.dispatch`."""

from moe_course.balance.bias import update_corrections, updated_correction
from moe_course.balance.losses import (
    assignments,
    device_balancing_loss,
    global_counts,
    importance_loss,
    load_balancing_loss,
    load_loss,
    sequence_balancing_loss,
    squared_cv,
    z_loss,
)
from moe_course.balance.metrics import (
    class_counts,
    co_activation,
    dead_experts,
    drop_rate,
    load_cv,
    load_entropy,
    max_violation,
    mutual_information,
    output_similarity,
    repeat_rate,
    router_saturation,
)

__all__ = [
    "assignments",
    "class_counts",
    "co_activation",
    "dead_experts",
    "device_balancing_loss",
    "drop_rate",
    "global_counts",
    "importance_loss",
    "load_balancing_loss",
    "load_cv",
    "load_entropy",
    "load_loss",
    "max_violation",
    "mutual_information",
    "output_similarity",
    "repeat_rate",
    "router_saturation",
    "sequence_balancing_loss",
    "squared_cv",
    "update_corrections",
    "updated_correction",
    "z_loss",
]
