"""Reference layers: complete, short, and equal to what production models run."""

from moe_course.layers.ffn import DenseFFN, SwiGLU

__all__ = ["DenseFFN", "SwiGLU"]
