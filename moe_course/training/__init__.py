"""Training of small byte-level language models: text, the loop, and the experiments that take longer than a chapter."""

from moe_course.training.data import DOMAINS, Batches, documents, load
from moe_course.training.loop import (
    Recipe,
    bits_per_byte,
    flops_per_token,
    learning_rate,
    load_per_expert,
    mean_balancing_loss,
    state_bytes,
    train,
)

__all__ = [
    "DOMAINS",
    "Batches",
    "Recipe",
    "bits_per_byte",
    "documents",
    "flops_per_token",
    "learning_rate",
    "load",
    "load_per_expert",
    "mean_balancing_loss",
    "state_bytes",
    "train",
]
