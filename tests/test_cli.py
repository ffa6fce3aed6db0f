"""The command `moe-course`, as a learner calls it."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import nbformat
import pytest

import moe_course
from moe_course import cli
from moe_course.grading import notebook as grading_notebook
from moe_course.grading import run as grading_run
from moe_course.specs.zoo import hf_configs

MIXTRAL = hf_configs["mixtral-8x7b"]


def _refused(capsys, *words: str) -> str:
    """The one line that a command which cannot be carried out leaves on stderr."""
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moe-course: ")
    assert err.count("\n") == 1
    return err


def test_version_through_the_module(root):
    done = subprocess.run(
        [sys.executable, "-m", "moe_course.cli", "version"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"moe-course {moe_course.__version__}\n",
        "",
    )


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["solve"])
    assert caught.value.code == 2
    assert "invalid choice: 'solve'" in capsys.readouterr().err


def test_count_prints_the_breakdown(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dict(MIXTRAL)))
    assert cli.main(["count", str(path)]) == 0
    rows = {
        line[:16].strip(): line[16:].split()
        for line in capsys.readouterr().out.splitlines()[1:-1]
    }
    assert rows["all"] == ["46,702,792,704", "12,879,925,248"]
    assert rows["experts"] == ["45,097,156,608", "11,274,289,152"]
    assert "shared" not in rows  # a component that the model does not have
    parts = [
        [int(n.replace(",", "")) for n in row]
        for name, row in rows.items()
        if name != "all"
    ]
    assert [sum(column) for column in zip(*parts, strict=True)] == [
        46_702_792_704,
        12_879_925_248,
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{oops", "is not JSON"),
        ("", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[1, 2]", "one object, got list"),
        (json.dumps({"model_type": "gpt2"}), "unknown model_type 'gpt2'"),
        (
            json.dumps({k: v for k, v in MIXTRAL.items() if k != "hidden_size"}),
            "lacks the key 'hidden_size'",
        ),
        (
            json.dumps({**MIXTRAL, "num_local_experts": 1}),
            r"k (2) must not exceed the number of experts (1)",
        ),
        (
            json.dumps({**MIXTRAL, "tie_word_embeddings": "false"}),
            "tied_embeddings must be True or False",
        ),
    ],
)
def test_count_says_what_is_wrong_with_a_config(tmp_path, capsys, text, reason):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert reason in _refused(capsys, "count", str(path))


def test_count_of_what_is_no_file(tmp_path, capsys):
    assert "No such file" in _refused(capsys, "count", str(tmp_path / "config.json"))
    assert "cannot read" in _refused(capsys, "count", str(tmp_path))


@pytest.fixture
def course(tmp_path, root, monkeypatch):
    """A copy of the course's exercises, as the current folder."""
    shutil.copytree(root / "exercises", tmp_path / "course" / "exercises")
    monkeypatch.chdir(tmp_path / "course")
    return tmp_path / "course"


def test_start_copies_an_exercise_and_never_overwrites_it(course, capsys):
    copy = course / "my_work" / "01_concepts.ipynb"
    assert cli.main(["start", "01", "--no-open"]) == 0
    assert (
        copy.read_bytes() == (course / "exercises" / "01_concepts.ipynb").read_bytes()
    )
    assert str(copy) in capsys.readouterr().out
    copy.write_text("my work")
    assert cli.main(["start", "01", "--no-open"]) == 0
    assert copy.read_text() == "my work"
    assert "stays as it is" in capsys.readouterr().out


def test_start_from_a_folder_inside_the_course(course, monkeypatch):
    monkeypatch.chdir(course / "exercises")
    assert cli.main(["start", "01", "--no-open"]) == 0
    assert [p.name for p in (course / "my_work").iterdir()] == ["01_concepts.ipynb"]


@pytest.mark.parametrize("number", ["77", "1", "concepts", ".."])
def test_start_of_an_exercise_that_does_not_exist(course, capsys, number):
    assert f"no exercise {number!r}" in _refused(capsys, "start", number, "--no-open")
    assert not (course / "my_work").exists()


def test_start_outside_the_course(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # As if the package were installed elsewhere: the folder beside it is searched last.
    monkeypatch.setattr(
        grading_notebook,
        "__file__",
        str(tmp_path / "lib" / "moe_course" / "grading" / "notebook.py"),
    )
    assert "run this inside the course's folder" in _refused(
        capsys, "start", "01", "--no-open"
    )
    assert list(tmp_path.iterdir()) == []


def test_start_without_jupyterlab_makes_the_copy_and_says_so(
    course, monkeypatch, capsys
):
    monkeypatch.setattr(cli.shutil, "which", lambda *args, **kwargs: None)
    assert cli.main(["start", "01"]) == 2
    assert "JupyterLab is not installed" in capsys.readouterr().err
    assert (course / "my_work" / "01_concepts.ipynb").exists()


def test_start_opens_the_copy(course, monkeypatch):
    started = []
    monkeypatch.setattr(cli.shutil, "which", lambda *args, **kwargs: "jupyter-lab")
    monkeypatch.setattr(
        cli.os, "spawnv", lambda mode, program, words: started.append(words) or 0
    )
    assert cli.main(["start", "01"]) == 0
    assert started == [[sys.executable, "-m", "jupyterlab", "01_concepts.ipynb"]]


@pytest.fixture
def worked(root):
    return nbformat.read(root / "solutions" / "01_concepts.ipynb", as_version=4)


def _check(capsys, path, *cells_to_add, notebook=None) -> tuple[int, str]:
    if notebook is not None:
        notebook.cells[1:1] = [
            nbformat.v4.new_code_cell(source) for source in cells_to_add
        ]
        nbformat.write(notebook, path)
    code = cli.main(["check", str(path)])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err == ""
    return code, out


def test_check_of_the_worked_notebook_and_of_the_stub(root, tmp_path, capsys):
    shutil.copy(root / "exercises" / "01_concepts.ipynb", tmp_path / "stub.ipynb")
    code, out = _check(capsys, tmp_path)
    assert code == 1
    assert " 0 of 20  in all\nNext: 01.1" in out
    shutil.copy(root / "solutions" / "01_concepts.ipynb", tmp_path / "worked.ipynb")
    code, out = _check(capsys, tmp_path / "worked.ipynb")
    assert code == 0
    assert "20 of 20  in all" in out
    assert "!" not in out


def test_check_recognises_a_renamed_notebook_without_metadata(tmp_path, capsys, worked):
    worked.metadata = {}
    for cell in worked.cells:
        cell.metadata = {}
    code, out = _check(capsys, tmp_path / "my answer (1).ipynb", notebook=worked)
    assert (code, "20 of 20  in all" in out) == (0, True)


def test_check_grades_answers_whose_check_cells_were_deleted(tmp_path, capsys, worked):
    worked.cells = [
        cell
        for cell in worked.cells
        if "check(" not in cell.source and "total(" not in cell.source
    ]
    code, out = _check(capsys, tmp_path / "01.ipynb", notebook=worked)
    assert (code, "20 of 20  in all" in out) == (0, True)


def test_check_goes_on_after_a_cell_that_raises(tmp_path, capsys, worked):
    code, out = _check(
        capsys,
        tmp_path / "01.ipynb",
        "raise RuntimeError('on purpose')",
        notebook=worked,
    )
    assert (
        "! cell 2 (raise RuntimeError('on purpose')) raised RuntimeError: on purpose"
        in out
    )
    assert (code, "20 of 20  in all" in out) == (0, True)


def test_check_survives_a_cell_that_kills_the_kernel(tmp_path, capsys, worked):
    code, out = _check(
        capsys, tmp_path / "01.ipynb", "import os; os._exit(1)", notebook=worked
    )
    assert "kernel died" in out
    assert (code, " 0 of 20  in all" in out) == (1, True)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("gone.ipynb", None, "there is no such file"),
        ("essay.txt", "An MoE layer is", "not a notebook"),
        ("cut.ipynb", '{"cells": [{"cell_type": "co', "not a notebook"),
        ("list.ipynb", "[]", "not a notebook"),
        ("empty.ipynb", "", "not a notebook"),
        (
            "other.ipynb",
            nbformat.writes(nbformat.v4.new_notebook()),
            "belongs to no exercise",
        ),
    ],
)
def test_check_says_what_is_wrong_with_a_file(tmp_path, capsys, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    err = _refused(capsys, "check", str(path))
    assert reason in err
    assert name in err


def test_check_of_an_empty_folder(tmp_path, capsys):
    assert "no notebook in this folder" in _refused(capsys, "check", str(tmp_path))


def test_check_of_several_files_reports_each_and_the_worst_code(root, tmp_path, capsys):
    (tmp_path / "a_broken.ipynb").write_text("{")
    shutil.copy(root / "solutions" / "01_concepts.ipynb", tmp_path / "b_worked.ipynb")
    assert cli.main(["check", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "20 of 20  in all" in out
    assert err.startswith("moe-course: ")
    assert err.count("\n") == 1


def _with_answer(worked, question_id, source):
    (cell,) = [c for c in worked.cells if question_id in c.metadata.get("tags", ())]
    cell.source = source
    return worked


ENDLESS = (
    "def gqa_params(width, heads, kv_heads, head_dim):\n    while True:\n        pass"
)
STUBBORN = """def gqa_params(width, heads, kv_heads, head_dim):
    while True:
        try:
            while True:
                pass
        except KeyboardInterrupt:
            pass
"""


def test_an_endless_answer_costs_its_own_question(
    tmp_path, capsys, worked, monkeypatch
):
    monkeypatch.setattr(grading_run, "CELL_SECONDS", 3)
    worked = _with_answer(worked, "01.3", ENDLESS)
    worked = _with_answer(worked, "01.5", "")  # it calls 01.3
    code, out = _check(capsys, tmp_path / "01.ipynb", notebook=worked)
    assert (code, " 13 of 20  in all" in out) == (1, True)
    assert '(check("01.3", gqa_params)) ran longer than 3 s and was stopped' in out


def test_an_answer_that_ignores_the_interrupt_is_ended(
    tmp_path, capsys, worked, monkeypatch
):
    monkeypatch.setattr(grading_run, "CELL_SECONDS", 3)
    worked = _with_answer(worked, "01.3", STUBBORN)
    code, out = _check(capsys, tmp_path / "01.ipynb", notebook=worked)
    assert code == 1
    assert "kernel died" in out


def test_errors_stored_long_ago_are_not_reported(tmp_path, capsys, worked):
    old = nbformat.v4.new_output(
        "error", ename="OldError", evalue="last week", traceback=[]
    )
    cell = nbformat.v4.new_code_cell("", outputs=[old])
    worked.cells.insert(2, cell)
    code, out = _check(capsys, tmp_path / "01.ipynb", notebook=worked)
    assert (code, "OldError" in out) == (0, False)


@pytest.mark.parametrize("metadata", [None, "01", {"exercise": 7}])
def test_odd_metadata_is_passed_over(tmp_path, capsys, worked, metadata):
    worked.metadata["moe_course"] = metadata
    path = tmp_path / "01.ipynb"
    path.write_text("\ufeff" + nbformat.writes(worked), encoding="utf-8")  # and a BOM
    assert cli.main(["check", str(path)]) == 0
    assert "20 of 20" in capsys.readouterr().out


def test_a_kernel_that_does_not_start_is_one_line(
    tmp_path, capsys, worked, monkeypatch
):
    kernels = tmp_path / "share" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    spec = {
        "argv": ["no-such-python", "{connection_file}"],
        "display_name": "x",
        "language": "python",
    }
    (kernels / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    path = tmp_path / "01.ipynb"
    nbformat.write(worked, path)
    assert cli.main(["check", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"moe-course: {path}: its kernel does not run")
    assert err.count("\n") == 1


def test_ctrl_c_is_one_line(capsys, monkeypatch, tmp_path, worked):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(grading_run, "run", interrupted)
    nbformat.write(worked, tmp_path / "01.ipynb")
    assert cli.main(["check", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "moe-course: stopped\n"


def test_output_survives_a_console_without_the_sign(root, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "moe_course.cli",
            "check",
            "solutions/01_concepts.ipynb",
        ],
        cwd=root,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"20 of 20  in all" in done.stdout


def test_check_of_nothing_is_refused(capsys, tmp_path):
    assert "empty name" in _refused(capsys, "check", "")
    assert "not a file" in _refused(capsys, "check", os.devnull)
    assert "moe-course: " in _refused(capsys, "check", str(tmp_path / ("x" * 400)))


@pytest.mark.parametrize(
    "block",
    [
        lambda work: work.write_text("a file"),
        lambda work: work.symlink_to(work.parent / "nowhere"),
    ],
)
def test_start_says_why_it_cannot_copy(course, capsys, block):
    block(course / "my_work")
    assert "cannot write" in _refused(capsys, "start", "01", "--no-open")


def test_start_leaves_no_torn_copy(course, capsys, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    assert "No space left" in _refused(capsys, "start", "01", "--no-open")
    monkeypatch.undo()
    assert list((course / "my_work").iterdir()) == []


def test_count_refuses_absurd_configs(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dict(MIXTRAL) | {"num_hidden_layers": 10**30}))
    assert "at most 10000" in _refused(capsys, "count", str(path))
    path.write_text("[" * 100_000)
    assert "is not JSON" in _refused(capsys, "count", str(path))
    path.write_text("\ufeff" + json.dumps(dict(MIXTRAL)), encoding="utf-8")
    assert cli.main(["count", str(path)]) == 0
