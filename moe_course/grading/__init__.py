"""Checks for the exercises: the same named invariants in the notebook, on the command line and in the tests."""

from moe_course.grading.notebook import check, solution, total

__all__ = ["check", "solution", "total"]
