"""Run an exercise notebook from top to bottom and grade the answers it defines: `moe-course check`."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_course.grading.core import (
    Line,
    Outcome,
    exercise_numbers,
    load_exercise,
    ungraded,
)
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

    try:
        if not path.exists():
            raise UnreadableError(f"{path}: there is no such file")
        if not path.is_file():
            raise UnreadableError(f"{path}: not a file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"{path}: not a notebook that can be read (not text)"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of missing cell ids, which older tools leave out
            notebook = nbformat.reads(text, as_version=4)
            nbformat.validate(notebook)
    except (
        Exception
    ) as error:  # nbformat raises many kinds, from JSON errors to KeyErrors
        reason = first_line(str(error)) or type(error).__name__
        raise UnreadableError(
            f"{path}: not a notebook that can be read ({reason})"
        ) from error
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    named = exercises_named(notebook.metadata, code)
    if not named:
        known = ", ".join(exercise_numbers())
        raise UnreadableError(
            f"{path}: belongs to no exercise of this course (known: {known})"
        )
    return notebook, named[0]


def exercises_named(metadata: object, code: str) -> list[str]:
    """The exercises that a notebook says it is of: in its metadata first, then by its check cells.

    A tool that drops unknown metadata leaves the check cells.
    """
    ours = metadata.get("moe_course") if isinstance(metadata, dict) else None
    named = [str(ours.get("exercise"))] if isinstance(ours, dict) else []
    named += re.findall(r"""\bcheck\(\s*(?:question_id\s*=\s*)?["'](\d\d)\.\d""", code)
    return [number for number in named if number in exercise_numbers()]


def first_line(text: str) -> str:
    return text.splitlines()[0][:200] if text else ""


def run(path: Path) -> Run:
    """Execute the notebook in a fresh kernel, in its own folder; cells that fail do not stop the later ones.

    Raises UnreadableError where the file is no exercise or no kernel starts.
    """
    import nbformat
    from nbclient.exceptions import DeadKernelError

    notebook, number = read(path)
    own = len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []  # errors stored long ago are not today's
    for question in load_exercise(
        number
    ).questions:  # a cell each, so that an endless answer costs one question
        source = f'from moe_course.grading.notebook import emit_result\nemit_result("{question.id}")'
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    client = _client(notebook, path.parent)
    troubles = []
    try:
        client.execute()
    except DeadKernelError:
        troubles.append("the notebook's kernel died; nothing after that cell ran")
    except KeyboardInterrupt:
        raise
    except Exception as error:
        if stopped(client):
            raise KeyboardInterrupt from error
        reason = f"{type(error).__name__}: {first_line(str(error))}"
        raise UnreadableError(
            f"{path}: its kernel does not run ({reason}); see `moe-course doctor`"
        ) from error
    for place, cell in enumerate(notebook.cells):
        troubles += [
            f"{_name(place, own, cell)} {what}" for what in _errors(cell, client.late)
        ]
    results = {}
    for cell in notebook.cells[own:]:
        for output in cell.outputs:
            if RESULT_TYPE in output.get("data", {}):
                raw = json.loads(output["data"][RESULT_TYPE])
                results[raw["question"]] = Outcome(
                    **raw | {"lines": tuple(Line(**line) for line in raw["lines"])}
                )
    outcomes = [
        results.get(question.id)
        or ungraded(question, "not graded: what ran before did not come to an end")
        for question in load_exercise(number).questions
    ]
    return Run(path, number, outcomes, troubles)


def _client(notebook: Any, folder: Path) -> Any:
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    class Client(NotebookClient):
        """Notes the cells that ran out of time, and ends a kernel that does not let itself be interrupted."""

        late: list[Any]

        async def _async_handle_timeout(self, timeout: int, cell: Any = None) -> Any:
            if any(cell is other for other in self.late):
                kernel: Any = self.km
                await kernel.shutdown_kernel(now=True)
                raise DeadKernelError("a cell could not be interrupted")
            self.late.append(cell)
            return await super()._async_handle_timeout(timeout, cell)

    client = Client(
        notebook,
        timeout=CELL_SECONDS,
        interrupt_on_timeout=True,
        allow_errors=True,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder.resolve())}},
    )
    client.late = []
    return client


def stopped(client: Any) -> bool:
    """nbclient answers Ctrl-C by shutting its kernel down, and then stumbles over the missing kernel."""
    return client.km is None


def _name(place: int, own: int, cell: Any) -> str:
    if place >= own:
        return "grading"
    return f"cell {place + 1} ({first_line(cell.source.strip())[:60]})"


def _errors(cell: Any, late: list[Any]) -> list[str]:
    if any(cell is other for other in late):
        return [f"ran longer than {CELL_SECONDS} s and was stopped"]
    errors = [
        output for output in cell.get("outputs", ()) if output.output_type == "error"
    ]
    return [f"raised {error.ename}: {first_line(error.evalue)}" for error in errors]


def notebooks(paths: list[Path]) -> list[Path]:
    """The notebooks named, and those inside the folders named. Raises UnreadableError when there is none."""
    found: list[Path] = []
    for path in paths:
        try:
            folder = path.is_dir()
            inside = sorted(path.rglob("*.ipynb")) if folder else []
            if folder:
                next(
                    path.iterdir(), None
                )  # rglob passes silently over a folder that it cannot read
        except OSError as error:
            raise UnreadableError(f"{path}: {error.strerror}") from error
        inside = [p for p in inside if ".ipynb_checkpoints" not in p.parts]
        if folder and not inside:
            raise UnreadableError(
                f"{path}: no notebook in this folder; `moe-course start 01` puts one in my_work/"
            )
        found += inside if folder else [path]
    return found
