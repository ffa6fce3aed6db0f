"""What published models and machines are, as plain numbers. Standard library only."""

from moe_course.specs.hardware import Accelerator, accelerators
from moe_course.specs.model import FFN, GQA, MLA, Count, ModelSpec, RoutedExperts
from moe_course.specs.zoo import Published, published, zoo

__all__ = [
    "FFN",
    "GQA",
    "MLA",
    "Accelerator",
    "Count",
    "ModelSpec",
    "Published",
    "RoutedExperts",
    "accelerators",
    "published",
    "zoo",
]
