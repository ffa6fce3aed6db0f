"""The runs of a study: kept, made once, side by side, and their command line."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from moe_course import records
from moe_course.training import runs


def test_a_run_is_made_once_and_kept_with_what_identifies_it(tmp_path):
    calls = []
    identity = {"seed": 1, "parts": ("a", "b")}  # a tuple is a list in the file

    def make():
        calls.append(1)
        return {"bits": 2.5}

    path = tmp_path / "run.json"
    assert runs.kept(path, identity) is None
    assert runs.made(path, identity, make)["bits"] == 2.5
    assert runs.made(path, identity, make)["bits"] == 2.5
    assert len(calls) == 1
    assert json.loads(path.read_text()) == {"seed": 1, "parts": ["a", "b"], "bits": 2.5}
    for other in ({"seed": 2, "parts": ("a", "b")}, {"seed": 1, "parts": ("a",)}):
        with pytest.raises(ValueError, match="of another setup"):
            runs.made(path, other, make)
    assert len(calls) == 1


def test_a_run_that_fails_is_not_kept(tmp_path):
    def fails():
        raise FloatingPointError("on purpose")

    with pytest.raises(FloatingPointError):
        runs.made(tmp_path / "run.json", {}, fails)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_one_process_ends_all(capsys):
    with pytest.raises(ValueError, match="invalid literal"):
        runs.side_by_side(int, ["1", "no number", "3"], 1)
    assert multiprocessing.active_children() == []
    runs.side_by_side(int, [], 1)  # nothing to do starts nothing


def line(rows, tmp_path, *words):
    arguments = ["--record", str(tmp_path / "record.json"), *words]
    return runs.command_line(
        "a.study", "name", tmp_path, tmp_path / "no", rows, arguments
    )


def test_the_command_line_records_what_was_made(tmp_path, capsys):
    seen = []

    def rows(folder, jobs):
        seen.append((folder, jobs))
        return [{"bits": 1.0}, {"bits": 2.0}]

    assert line(rows, tmp_path, "--jobs", "3", "--out", str(tmp_path / "runs")) == 0
    assert seen == [(tmp_path / "runs", 3)]
    record = records.load(tmp_path / "record.json")
    assert record.command == "python -m a.study"
    assert record.name == "name"
    assert record.rows == [{"bits": 1.0}, {"bits": 2.0}]
    assert "2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("no such text"), 2, "error: no such text"),
        (KeyboardInterrupt(), 130, "goes on from"),
    ],
)
def test_what_stops_a_study_is_said_and_nothing_is_recorded(
    tmp_path, capsys, error, status, said
):
    def rows(folder, jobs):
        raise error

    assert line(rows, tmp_path) == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


def test_a_number_of_processes_below_one_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        line(lambda *_: [], tmp_path, "--jobs", "0")
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
