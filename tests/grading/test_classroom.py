"""What a class gets holds no solution, and works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_course.grading import classroom
from moe_course.grading.core import exercise_numbers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class") / "course"
    assert classroom.export(ROOT, folder) == len(classroom.exported(ROOT))
    return folder


def solution_lines():
    """Lines of code that only the worked solutions have: some others give a similar line to start from."""
    lines, given = set(), ""
    for master in (ROOT / "solutions").glob("[0-9]*.py"):
        text = master.read_text("utf-8")
        for body in re.findall(r"# BEGIN SOLUTION\n(.*?)# END SOLUTION", text, re.S):
            lines |= {row.strip() for row in body.splitlines() if len(row.strip()) > 45}
        given += re.sub(r"# BEGIN SOLUTION\n(.*?)# END SOLUTION", "", text, flags=re.S)
    return {line for line in lines if line not in given}


def test_no_line_of_a_solution_goes_out(out):
    lines = solution_lines()
    assert len(lines) > 10
    for path in out.rglob("*"):
        if path.suffix in (".py", ".md"):
            text = path.read_text("utf-8")
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text("utf-8"))["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells)
        else:
            continue
        found = [line for line in lines if line in text]
        assert not found, (path, found)


def test_the_book_the_exercises_and_the_package_go_out(out):
    assert (out / "Makefile").is_file()
    assert (out / "_toc.yml").is_file()
    for number in exercise_numbers():
        assert list(out.glob(f"exercises/{number}_*.ipynb"))
    assert not (out / "solutions").exists()
    assert not (out / "tests").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import moe_course; print(moe_course.__file__)"],
        cwd=out,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(out))


def test_solution_says_that_there_is_none(out):
    code = (
        "from moe_course.grading import notebook\n"
        "notebook._attempts['01.1'] = {1, 2}\n"
        "notebook.solution('01.1')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=out,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "comes without solutions" in done.stdout


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert classroom.main([str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert classroom.main([""]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_outside_a_checkout_there_is_nothing_to_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert classroom.main([str(tmp_path / "out")]) == 2
    assert "no git checkout" in capsys.readouterr().err
