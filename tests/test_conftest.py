"""The policy on skips: listed with their reasons, and failures where MOE_COURSE_NO_SKIP=1."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

INNER = {
    "test_inner.py": """
import pytest

def test_no_browser():
    pytest.skip("no Chromium")

@pytest.mark.skip(reason="needs a GPU")
def test_gpu():
    pass

@pytest.mark.xfail(reason="known", strict=True)
def test_known():
    assert False
""",
    "test_peer.py": "import pytest\npytest.importorskip('no_such_peer')\n",
}


@pytest.mark.parametrize(
    ("no_skip", "code", "outcomes"),
    [("0", 0, "3 skipped, 1 xfailed"), ("1", 1, "1 failed, 1 skipped, 1 xfailed")],
)
def test_skips_are_listed_and_refused_on_demand(
    root, tmp_path, no_skip, code, outcomes
):
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    shutil.copy(root / "pyproject.toml", tmp_path)
    for name, text in INNER.items():
        (tmp_path / name).write_text(text)
    # The module that cannot be collected ends a run without this option, before any test.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        ".",
    ]
    environment = os.environ | {"MOE_COURSE_NO_SKIP": no_skip}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcomes in done.stdout.splitlines()[-1], done.stdout
    assert done.returncode == code
    summary = done.stdout.partition("short test summary info")[2]
    assert "needs a GPU" in summary
    if no_skip == "0":
        assert "no Chromium" in summary
        assert "no_such_peer" in summary
    else:
        assert "allows no skip but the GPU's: Skipped: no Chromium" in done.stdout
        assert (
            "allows no skip but the GPU's: Skipped: could not import 'no_such_peer'"
            in done.stdout
        )
        assert "1 error" in done.stdout
