"""A class that never was: notebooks with right, wrong and missing answers, to try grading on before term starts.

python -m moe_course.grading.sample FOLDER --exercise 01 [--students 30] [--seed 0] [--no-trouble]

Wrong answers are the worked ones with one operator or number changed, which is what most wrong answers look like; some
of them may be right all the same. The last ones make trouble: a file cut off, much memory, an exit, an endless loop.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_course.grading.core import load_exercise

# fmt: off
NAMES = [
    "ada", "ahmed", "aiko", "ana", "arun", "astrid", "ben", "carla", "chen", "cleo", "dan", "diego", "dina", "elif",
    "emil", "fatima", "finn", "grace", "hana", "hugo", "ines", "ivan", "jana", "joel", "kofi", "lara", "leo", "lin",
    "malik", "maria", "mei", "mina", "nadia", "nils", "noor", "olga", "omar", "paul", "petra", "priya", "quinn",
    "rosa", "sam", "sara", "sofia", "tariq", "theo", "uma", "vera", "wei", "yara", "yusuf", "zoe",
]
# fmt: on

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.Gt: ast.GtE,
    ast.LtE: ast.Lt,
    ast.GtE: ast.Gt,
}

TROUBLE = {
    "endless loop": "while True:\n        pass",
    "exit": "import os\n    os._exit(0)",
    "much memory": "return len(bytes(2**34))",
}


def slip(source: str, rng: random.Random) -> str:
    """The code with one operator or number of it changed; without one, as it is."""
    tree = ast.parse(source)

    def changes(node: ast.AST) -> bool:
        return type(node) in SWAPPED or (
            isinstance(node, ast.Constant) and type(node.value) is int
        )

    spots = [node for node in ast.walk(tree) if changes(node)]
    if not spots:
        return source
    spot = rng.choice(spots)

    class Change(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> ast.AST:
            if node is not spot:
                return super().generic_visit(node)
            if isinstance(node, ast.Constant):
                assert isinstance(node.value, int)
                # Not -1: that would be two things, a minus and a one.
                other = node.value + rng.choice([-1, 1])
                return ast.Constant(other if other >= 0 else 1)
            return SWAPPED[type(node)]()

    return ast.unparse(ast.fix_missing_locations(Change().visit(tree)))


def answer(worked: str, stub: str, skill: float, rng: random.Random) -> str:
    """What a student of that skill, 0 to 1, hands in for one question."""
    if rng.random() < skill:
        return worked
    kind = rng.choices(["slip", "stub", "raises", "no parse"], [6, 2, 1, 1])[0]
    if kind == "slip":
        return slip(worked, rng)
    if kind == "raises":
        return f"{stub.rstrip()}\n    return unfinished\n"
    return stub if kind == "stub" else f"{stub.rstrip()}\n    return (\n"


def notebook(
    root: Path, exercise: str, skill: float, rng: random.Random
) -> dict[str, Any]:
    """One student's notebook: the exercise's cells with answers in them."""
    stem = load_exercise(exercise).stem
    stubs, worked = (
        json.loads((root / folder / f"{stem}.ipynb").read_text("utf-8"))
        for folder in ("exercises", "solutions")
    )
    given = {_question(cell, exercise): cell for cell in worked["cells"]}
    for cell in stubs["cells"]:
        question = _question(cell, exercise)
        if question:
            source = "".join(cell["source"])
            right = "".join(given[question]["source"])
            cell["source"] = answer(right, source, skill, rng)
    made: dict[str, Any] = stubs
    return made


def _question(cell: dict[str, Any], exercise: str) -> str:
    tags = cell["metadata"].get("tags", ())
    return next((tag for tag in tags if tag.startswith(f"{exercise}.")), "")


def write_class(
    root: Path, out: Path, exercise: str, students: int, seed: int, trouble: bool = True
) -> list[Path]:
    """Write one notebook for each student; the same seed writes the same bytes.

    Raises ValueError when the folder has something in it, and OSError where the exercise or its solution is missing.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder")
    if not 1 <= students <= 100_000:
        raise ValueError(f"students must be 1 to 100,000, got {students}")
    rng = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    last = load_exercise(exercise).questions[-1]
    for number in range(students):
        name = NAMES[number % len(NAMES)] + (
            str(number // len(NAMES) + 1) if number >= len(NAMES) else ""
        )
        made = notebook(root, exercise, rng.betavariate(3, 1), rng)
        left = students - number
        if trouble and left <= len(TROUBLE):
            body = list(TROUBLE.values())[left - 1]
            for cell in made["cells"]:
                if _question(cell, exercise) == last.id:
                    cell["source"] = (
                        f"def {last.answer}(*args, **kwargs):\n    {body}\n"
                    )
        text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
        if trouble and left == len(TROUBLE) + 1:
            text = text[: len(text) // 2]
        path = out / f"{name}.ipynb"
        path.write_text(text, "utf-8")
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_course.grading.sample")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exercise", default="01", metavar="NN")
    parser.add_argument("--students", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-trouble", action="store_true")
    args = parser.parse_args(arguments)
    root = Path(__file__).parents[2]
    try:
        written = write_class(
            root,
            args.folder,
            args.exercise,
            args.students,
            args.seed,
            not args.no_trouble,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} notebooks in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
