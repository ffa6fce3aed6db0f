"""Make the notebooks that are derived, and say which files have drifted.

`python -m moe_course.grading.derive` writes, `--check` only compares. From each master solutions/NN_topic.py come
exercises/NN_topic.ipynb (the stubs) and solutions/NN_topic.ipynb (worked). Every notebook of the book gets the same
hidden first cell, which makes it run where the course is not installed, as in Colab. Same input, same bytes.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from moe_course.grading.core import Exercise, load_exercise

LEAK = re.compile(
    r"(?im)^\s*#+\s*(begin|end)\s+solution"
)  # however a marker is mistyped
BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
GOLDEN = "nbval-check-output"  # tag of the cells whose stored outputs are compared

_WITH_ADDRESS = """\
# Where the course is not installed yet, as in Colab, this installs it.
try:
    import moe_course  # noqa: F401
except ModuleNotFoundError:
    %pip install -q "moe_course[exercises] @ git+{address}\""""

_WITHOUT_ADDRESS = """\
# The course must be installed: run `pip install ".[exercises]"` in its folder.
import moe_course  # noqa: F401"""


def setup_cell(address: str) -> str:
    """Source of the hidden first cell; `address` is the repository's, "" while it has none.

    It installs without constraints.txt, which would replace the torch that Colab has.
    """
    return _WITH_ADDRESS.format(address=address) if address else _WITHOUT_ADDRESS


def read_address(root: Path) -> str:
    """`repository.url` of _config.yml."""
    import yaml

    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")) or {}
    return str((config.get("repository") or {}).get("url") or "")


def without_solution(source: str) -> str:
    """The stub: what stands between the markers goes. Raises ValueError on unbalanced markers."""
    kept, inside = [], False
    for line in source.splitlines():
        mark = line.strip()
        if mark in (BEGIN, END):
            if inside == (mark == BEGIN):
                raise ValueError(f"unbalanced {mark!r}")
            inside = mark == BEGIN
        elif not inside:
            kept.append(line)
    if inside:
        raise ValueError(f"{BEGIN!r} without {END!r}")
    return "\n".join(kept)


def with_solution(source: str) -> str:
    """The worked cell: only the markers go."""
    return "\n".join(
        line for line in source.splitlines() if line.strip() not in (BEGIN, END)
    )


def fill(text: str, exercise: Exercise) -> str:
    """Replace {meta NN.i}, {minutes} and {points} by what the checks say, so that no page says otherwise."""

    def meta(match: re.Match[str]) -> str:
        question = exercise.question(match[1])
        plural = "s" * (question.points != 1)
        stars = "●" * question.difficulty + "○" * (3 - question.difficulty)
        return f"*{question.points} point{plural} · difficulty {stars} · about {question.minutes} minutes*"

    minutes = sum(question.minutes for question in exercise.questions)
    text = re.sub(r"\{meta (\d\d\.\d+)\}", meta, text)
    text = text.replace(
        "{minutes}", f'<span data-minutes="{minutes}">{minutes} minutes</span>'
    )
    text = re.sub(r"(?<![\w\\])\{points\}", str(exercise.points), text)
    if "{meta" in text:
        raise ValueError(
            f"{exercise.stem}: a {{meta}} that names no question of the form {{meta 01.1}}"
        )
    return text


def syntax(source: str, question_id: str) -> str:
    """A cell's syntax tree as text, without comments. Raises ValueError where it does not compile."""
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError as error:
        raise ValueError(
            f"the cell of {question_id} does not compile: {error}"
        ) from error


def derive(master: Path, address: str) -> tuple[str, str]:
    """(exercise notebook, solution notebook) as text.

    Raises ValueError where a question of the checks has no cell, no text or no solution in the master, and where
    solving would do more than add lines.
    """
    import jupytext
    import nbformat

    number = master.name[:2]
    exercise = load_exercise(number)
    source = jupytext.reads(master.read_text(encoding="utf-8-sig"), fmt="py:percent")
    text = "\n".join(
        cell.source for cell in source.cells if cell.cell_type == "markdown"
    )
    tagged: dict[str, Any] = {}
    for cell in source.cells:
        for tag in cell.metadata.get("tags", ()):
            if tag in tagged or cell.cell_type != "code":
                raise ValueError(
                    f"{master.name}: the tag {tag} stands on two cells, or on text"
                )
            tagged[tag] = cell
    for question in exercise.questions:
        if f"{{meta {question.id}}}" not in text or question.id not in tagged:
            raise ValueError(
                f"{master.name}: question {question.id} needs a text with {{meta}} and a tagged cell"
            )
        stub, worked = (
            change(tagged[question.id].source)
            for change in (without_solution, with_solution)
        )
        if syntax(stub, question.id) == syntax(worked, question.id):
            raise ValueError(
                f"{master.name}: question {question.id} has no solution between its markers"
            )
        if not any(
            isinstance(n, ast.FunctionDef) and n.name == question.answer
            for n in ast.parse(stub).body
        ):
            raise ValueError(
                f"{master.name}: the cell of {question.id} must define {question.answer}"
            )

    def build(change: Any, kind: str) -> str:
        cells = [
            nbformat.v4.new_code_cell(
                setup_cell(address), metadata={"tags": ["remove-cell"]}
            )
        ]
        for cell in source.cells:
            if kind == "exercise" and LEAK.search(change(cell.source)):
                raise ValueError(
                    f"{master.name}: a marker that is none: {LEAK.search(cell.source)}"
                )
            if cell.cell_type == "markdown":
                cells.append(nbformat.v4.new_markdown_cell(fill(cell.source, exercise)))
            else:
                tags = (
                    {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
                )
                cells.append(
                    nbformat.v4.new_code_cell(change(cell.source), metadata=tags)
                )
        for place, cell in enumerate(cells):
            cell["id"] = f"{exercise.stem.replace('_', '-')}-{place:02d}"
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata = {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
            "moe_course": {"exercise": number, "kind": kind},
        }
        nbformat.validate(notebook)
        return str(nbformat.writes(notebook)) + "\n"

    return build(without_solution, "exercise"), build(with_solution, "solution")


def with_setup(path: Path, address: str) -> str:
    """The text of a book's notebook with its first, hidden cell as it must be."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)  # cells have ids
    wanted = nbformat.v4.new_code_cell(
        setup_cell(address), id="setup", metadata={"tags": ["remove-cell"]}
    )
    if notebook.cells and notebook.cells[0].get("id") == "setup":
        notebook.cells[0] = wanted
    else:
        notebook.cells.insert(0, wanted)
    return str(nbformat.writes(notebook)) + "\n"


def stray_outputs(path: Path) -> list[str]:
    """Cells that hold outputs though they are not golden, and golden cells without one."""
    import nbformat

    strays = []
    for place, cell in enumerate(nbformat.read(path, as_version=4).cells, start=1):
        if cell.cell_type != "code":
            continue
        golden = GOLDEN in cell.metadata.get("tags", ())
        if cell.outputs and not golden:
            strays.append(
                f"{path}: cell {place} has stored outputs; clear them, or tag the cell {GOLDEN}"
            )
        if not golden and cell.execution_count is not None:
            strays.append(
                f"{path}: cell {place} has an execution count; clear the outputs before committing"
            )
        if golden and (not cell.outputs or cell.execution_count is None):
            strays.append(
                f"{path}: cell {place} is tagged {GOLDEN} but has no stored output to compare"
            )
    return strays


def with_address(citation: str, address: str) -> str:
    """CITATION.cff with the repository's address, or without the line while there is none."""
    lines = [
        line
        for line in citation.splitlines()
        if not line.startswith("repository-code:")
    ]
    if address:
        lines.append(f'repository-code: "{address}"')
    return "\n".join(lines) + "\n"


def all_files(root: Path) -> dict[Path, str]:
    """Every derived file with the text it must have."""
    address = read_address(root)
    citation = root / "CITATION.cff"
    files = {citation: with_address(citation.read_text(encoding="utf-8"), address)}
    for master in sorted((root / "solutions").glob("[0-9][0-9]_*.py")):
        exercise, worked = derive(master, address)
        files[root / "exercises" / f"{master.stem}.ipynb"] = exercise
        files[root / "solutions" / f"{master.stem}.ipynb"] = worked
    for chapter in sorted((root / "book").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in chapter.parts:
            files[chapter] = with_setup(chapter, address)
    return files


def main(argv: list[str]) -> int:
    root = Path.cwd()
    if not (root / "_config.yml").exists():
        print("run this in the root of the repository", file=sys.stderr)
        return 2
    try:
        files = all_files(root)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    complaints = [
        f"{path.relative_to(root)} has no master solutions/{path.stem}.py: delete it"
        for folder in ("exercises", "solutions")
        for path in sorted((root / folder).glob("*.ipynb"))
        if path not in files
    ]
    for path, text in files.items():
        same = path.exists() and path.read_text(encoding="utf-8") == text
        if "--check" in argv:
            if not same:
                complaints.append(
                    f"{path.relative_to(root)} has drifted from its source: run `make exercises`"
                )
        elif not same:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote {path.relative_to(root)}")
        if path.suffix == ".ipynb" and path.exists():
            complaints += stray_outputs(path)
    print("\n".join(complaints), file=sys.stderr, end="\n" * bool(complaints))
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
