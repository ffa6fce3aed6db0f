"""What every test shares: checked shapes, reproducible random cases, and no silent skips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import settings

# Modules that carry tensors run with their shape annotations enforced. Modules of @triton.jit functions must stay
# out: the hook breaks their globals. Everything else has no tensors, and its own ValueErrors to test.
jaxtyping.install_import_hook(
    [
        "moe_course.layers",
        "moe_course.balance",
        "moe_course.parallel",
        "moe_course.quant",
    ],
    "beartype.beartype",
)

# The same cases on every run and every machine, however slow.
settings.register_profile("course", derandomize=True, deadline=None, database=None)
settings.load_profile("course")

# Kernels are interpreted; triton reads this when it is first imported, by whichever test.
os.environ.setdefault("TRITON_INTERPRET", "1")

NO_SKIP = os.environ.get("MOE_COURSE_NO_SKIP") == "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).parents[1]


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Shape annotations off, for tests of the ValueError that a user without them sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    # Of a skip, and of no expected failure, longrepr is a tuple.
    if NO_SKIP and report.skipped and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        if "GPU" not in reason:
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: MOE_COURSE_NO_SKIP=1 allows no skip but the GPU's: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _refuse_skip(report)
    return report
