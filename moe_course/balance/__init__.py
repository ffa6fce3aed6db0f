"""Load balancing: losses, biases, capacity and metrics."""

from moe_course.balance.losses import load_balancing_loss

__all__ = ["load_balancing_loss"]
