"""Gradescope: a zip whose `run_autograder` calls `moe-course grade`, and its results.json.

Formats: Gradescope's documentation for instructors, "Autograder Specifications".
"""

from __future__ import annotations

import json
import shlex
import zipfile
from pathlib import Path
from typing import Any

from moe_course.grading.core import MARKS
from moe_course.grading.judge import GRADED, Result, Verdict

# What the package is installed from; no exercise, solution or test goes along.
COURSE = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "moe_course")

SETUP = """#!/usr/bin/env bash
# Choose a base image with Python 3.11 or newer (Ubuntu 24.04).
set -e
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv bubblewrap util-linux
python3 -m venv /autograder/venv
cd /autograder/source/course
/autograder/venv/bin/pip install --no-cache-dir -c constraints.txt ".[exercises]"
"""

RUN = """#!/usr/bin/env bash
# Where the host forbids namespaces, the results say that no sandbox was used.
/autograder/venv/bin/moe-course grade /autograder/submission --exercise {exercise} -o /tmp/grades -j 1 {options} \\
  --sandbox-if-possible --gradescope /autograder/results/results.json
"""


def results(result: Result) -> str:
    """One submission's results.json. What is not graded has no score: a person sets it."""
    content: dict[str, Any] = {
        "execution_time": round(result.seconds),
        "stdout_visibility": "hidden",
        "tests": [_test(number, v) for number, v in enumerate(result.verdicts, 1)],
    }
    notes = [] if result.sandboxed else ["Graded without a sandbox (unsandboxed)."]
    if result.status == GRADED:
        content["score"] = result.points
    else:
        notes.append(f"{result.status}: {result.reason}")
    notes += result.troubles
    content["output"] = "\n".join(notes)
    return json.dumps(content, indent=1) + "\n"


def _test(number: int, verdict: Verdict) -> dict[str, Any]:
    rows = [verdict.reason] if verdict.status != GRADED else []
    for line in verdict.lines:
        rows.append(f"{MARKS.get(str(line['status']), '')} {line['name']}")
        rows += [str(line[key]) for key in ("detail", "hint") if line[key]]
    return {
        "number": str(number),
        "name": f"{verdict.question} {verdict.title}",
        "score": verdict.points,
        "max_score": verdict.out_of,
        "status": "passed" if verdict.points == verdict.out_of else "failed",
        "output": "\n".join(rows),
        "output_format": "text",
    }


def export(
    root: Path, out: Path, exercise: str, seed: str, private: Path | None
) -> None:
    """Write the zip to upload. Raises OSError where a file cannot be read or written."""
    options = f"--seed {shlex.quote(seed)}"
    if private is not None:
        options += " --private-checks /autograder/source/private"
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, "setup.sh", SETUP)
        _add(archive, "run_autograder", RUN.format(exercise=exercise, options=options))
        for name in COURSE:
            for path in sorted((root / name).rglob("*")) or [root / name]:
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, f"course/{path.relative_to(root).as_posix()}")
        for path in sorted(private.glob("*.py")) if private else []:
            archive.write(path, f"private/{path.name}")


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
    entry.external_attr = 0o755 << 16  # both are executed
    archive.writestr(entry, text)
