"""Weights in and out of production code."""

from moe_course.interop.huggingface import from_hf, to_hf

__all__ = ["from_hf", "to_hf"]
