"""Run an exercise notebook from top to bottom and grade the answers it defines: `moe-course check`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_course.grading.core import Line, Outcome, exercise_numbers, load_exercise
from moe_course.grading.notebook import RESULT_TYPE

CELL_SECONDS = 120


class UnreadableError(ValueError):
    """The file is no exercise notebook."""


@dataclass(frozen=True)
class Run:
    """What came out of one notebook: its exercise, an outcome per question, and cells that failed on the way."""

    path: Path
    number: str
    outcomes: list[Outcome]
    troubles: list[str]

    @property
    def full(self) -> bool:
        return all(outcome.full for outcome in self.outcomes)


def read(path: Path) -> tuple[Any, str]:
    """A notebook and the number of its exercise. Raises UnreadableError that says what is wrong with the file."""
    import nbformat

    if not path.is_file():
        raise UnreadableError(f"{path}: there is no such file")
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (
        Exception
    ) as error:  # nbformat raises many kinds, from JSON errors to KeyErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableError(
            f"{path}: not a notebook that can be read ({reason[:200]})"
        ) from error
    number = notebook.metadata.get("moe_course", {}).get("exercise")
    if number is None:
        # Saved by a tool that drops unknown metadata: the check cells name the exercise.
        code = "\n".join(
            cell.source for cell in notebook.cells if cell.cell_type == "code"
        )
        named = re.findall(r"""\bcheck\(\s*["'](\d\d)\.\d""", code)
        number = named[0] if named else None
    if number not in exercise_numbers():
        known = ", ".join(exercise_numbers())
        raise UnreadableError(
            f"{path}: belongs to no exercise of this course (known: {known})"
        )
    return notebook, number


def run(path: Path) -> Run:
    """Execute the notebook in a fresh kernel, in its own folder; cells that fail do not stop the later ones."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    notebook, number = read(path)
    notebook.cells.append(
        nbformat.v4.new_code_cell(
            f'from moe_course.grading.notebook import emit_result\nemit_result("{number}")'
        )
    )
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        interrupt_on_timeout=True,
        allow_errors=True,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent.resolve())}},
    )
    troubles = []
    try:
        client.execute()
    except DeadKernelError:
        troubles.append("the notebook's kernel died; nothing after that cell ran")
    for place, cell in enumerate(notebook.cells[:-1], start=1):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                first = (output.evalue or "").splitlines()[0] if output.evalue else ""
                troubles.append(f"cell {place} raised {output.ename}: {first}")
    for output in notebook.cells[-1].get("outputs", ()):
        if RESULT_TYPE in output.get("data", {}):
            return Run(path, number, _outcomes(output["data"][RESULT_TYPE]), troubles)
    empty = [
        Outcome(
            q.id,
            q.answer,
            q.points,
            tuple(Line(i.name, "not reached", i.points) for i in q.invariants),
            False,
        )
        for q in load_exercise(number).questions
    ]
    return Run(path, number, empty, troubles or ["the notebook did not run to its end"])


def _outcomes(text: str) -> list[Outcome]:
    return [
        Outcome(**raw | {"lines": tuple(Line(**line) for line in raw["lines"])})
        for raw in json.loads(text)
    ]


def notebooks(paths: list[Path]) -> list[Path]:
    """The notebooks named, and those inside the folders named. Raises UnreadableError when there is none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [
                p
                for p in sorted(path.rglob("*.ipynb"))
                if ".ipynb_checkpoints" not in p.parts
            ]
            if not inside:
                raise UnreadableError(
                    f"{path}: no notebook in this folder; `moe-course start 01` puts one in my_work/"
                )
            found += inside
        else:
            found.append(path)
    return found
