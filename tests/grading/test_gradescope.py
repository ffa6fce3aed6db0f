"""The zip that Gradescope runs, and what it reads back."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moe_course import cli
from moe_course.grading import gradescope, sandbox
from moe_course.grading.judge import nothing_graded

ROOT = Path(__file__).parents[2]
STUB = (ROOT / "exercises" / "01_concepts.ipynb").read_bytes()
SOLVED = (ROOT / "solutions" / "01_concepts.ipynb").read_bytes()


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "01_concepts.py").write_text("PRIVATE = {}\n")
    words = ["export", "gradescope", "--exercise", "01", "-o", str(tmp_path / "a.zip")]
    words += ["--seed", "it's 'ours'", "--private-checks", str(tmp_path / "private")]
    assert cli.main(words) == 0
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        file.extractall(tmp_path / "source")
        modes = {i.filename: i.external_attr >> 16 for i in file.infolist()}
    return tmp_path / "source", modes


def test_the_zip_holds_the_package_and_two_scripts(archive):
    source, modes = archive
    for name in ("setup.sh", "run_autograder"):
        assert modes[name] & stat.S_IXUSR
        subprocess.run(["bash", "-n", str(source / name)], check=True)
    assert (source / "course" / "moe_course" / "grading" / "worker.py").is_file()
    assert (source / "private" / "01_concepts.py").is_file()
    names = {p.name for p in (source / "course").iterdir()}
    assert names == set(gradescope.COURSE)


@pytest.mark.parametrize("name", ["solved", "nothing"])
def test_the_script_grades_and_writes_what_gradescope_reads(archive, tmp_path, name):
    """run_autograder itself, its folders moved here."""
    source, _ = archive
    there = tmp_path / "autograder"
    (there / "submission").mkdir(parents=True)
    (there / "venv" / "bin").mkdir(parents=True)
    command = f'#!/bin/sh\nexec {sys.executable} -m moe_course.cli "$@"\n'
    (there / "venv" / "bin" / "moe-course").write_text(command)
    (there / "venv" / "bin" / "moe-course").chmod(0o755)
    source.rename(there / "source")
    content = SOLVED if name == "solved" else b"?"
    (there / "submission" / "mine.ipynb").write_bytes(content)
    (there / "submission" / "a draft.ipynb").write_bytes(b"{}")
    script = (there / "source" / "run_autograder").read_text()
    script = script.replace("/autograder", str(there)).replace(
        "/tmp/grades", str(tmp_path / "g")
    )
    (there / "run").write_text(script)
    subprocess.run(
        ["bash", str(there / "run")], check=True, cwd=there / "source" / "course"
    )
    results = json.loads((there / "results" / "results.json").read_text())
    assert [t["max_score"] for t in results["tests"]] == [2, 2, 3, 4, 4, 3, 2]
    if name == "solved":
        assert results["score"] == 20
        assert {t["status"] for t in results["tests"]} == {"passed"}
        without = sandbox.why_not() is not None
        assert ("unsandboxed" in results["output"]) == without
    else:
        assert "score" not in results
        assert "unreadable" in results["output"]


def test_where_there_is_no_sandbox_the_results_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "no namespaces")
    (tmp_path / "a.ipynb").write_bytes(STUB)
    words = ["grade", str(tmp_path / "a.ipynb"), "--exercise", "01", "-j", "1"]
    words += ["-o", str(tmp_path / "g"), "--sandbox-if-possible"]
    assert cli.main([*words, "--gradescope", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["score"] == 0
    assert "unsandboxed" in results["output"]


def test_what_is_not_graded_gets_no_score():
    results = json.loads(
        gradescope.results(nothing_graded("01", "needs-review", "why"))
    )
    assert "score" not in results
    assert "needs-review: why" in results["output"]


def test_an_export_that_cannot_be_made_is_one_line(tmp_path, capsys):
    words = ["export", "gradescope", "-o", str(tmp_path / "no" / "a.zip")]
    assert cli.main([*words, "--exercise", "01"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert cli.main([*words, "--exercise", "99"]) == 2
    (tmp_path / "01_concepts.py").write_text("PRIVATE = 3")
    assert (
        cli.main([*words, "--exercise", "01", "--private-checks", str(tmp_path)]) == 2
    )
    assert "private checks" in capsys.readouterr().err
