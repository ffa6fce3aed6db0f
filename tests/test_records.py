"""Records: written whole, read back equal, and honest about where they come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata

import pytest

from moe_course import records
from moe_course.records import Record, load, load_if_measured, measure, save

ROWS = [{"batch": 1, "time_ms": 12.9}, {"batch": 2, "time_ms": 13.5}]
RECORD = Record(
    "decode",
    "make bench",
    "NVIDIA H200",
    {"python": "3.11.7"},
    "2026-05-04T10:20+00:00",
    "0123abcd",
    ROWS,
)


def test_a_record_reads_back_equal(tmp_path):
    path = tmp_path / "deep" / "decode.json"
    save(RECORD, path)
    assert load(path) == RECORD
    assert [p.name for p in path.parent.iterdir()] == ["decode.json"]


def test_what_was_not_measured_yet_is_none(tmp_path):
    path = tmp_path / "decode.json"
    assert load_if_measured(path) is None
    save(RECORD, path)
    assert load_if_measured(path) == RECORD
    path.write_text("{")
    with pytest.raises(ValueError, match="is no record"):  # broken is not missing
        load_if_measured(path)


def test_provenance_names_device_versions_date_command_and_revision():
    assert RECORD.provenance() == (
        "Recorded on 2026-05-04 on NVIDIA H200 with python 3.11.7 by `make bench` at revision 0123abcd."
    )


def test_measure_describes_this_machine_now():
    before = datetime.now(UTC).replace(second=0, microsecond=0)
    record = measure("sizes", "pytest", ROWS, packages=("pytest",))
    assert record.versions == {
        "python": platform.python_version(),
        "pytest": metadata.version("pytest"),
    }
    assert before <= datetime.fromisoformat(record.date) <= datetime.now(UTC)
    assert record.rows == ROWS
    assert record.device


def test_the_device_is_the_gpu_that_torch_would_use(monkeypatch):
    class Cuda:
        is_available = staticmethod(lambda: True)
        get_device_name = staticmethod(lambda: "NVIDIA Test")

    class Torch:
        cuda = Cuda

    monkeypatch.setitem(sys.modules, "torch", Torch)
    assert records.device_name() == "NVIDIA Test"
    Cuda.is_available = staticmethod(lambda: False)
    assert f"({os.cpu_count()} cores)" in records.device_name()


def test_a_measurement_without_rows_is_refused():
    with pytest.raises(ValueError, match="'empty' has no rows"):
        measure("empty", "pytest", [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no record: not JSON"),
        ("[]", "it lacks command, date, device, name, revision, rows, versions"),
        (
            json.dumps({"name": "x", "rows": []}),
            "it lacks command, date, device, revision, versions",
        ),
        (json.dumps(RECORD.__dict__ | {"extra": 1}), "has more"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_save_that_breaks_off_leaves_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "decode.json"
    save(RECORD, path)

    def half(self, text, **options):
        self.write_bytes(text.encode()[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(records.Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        save(RECORD, path)
    assert load(path) == RECORD


def test_the_revision_tells_committed_from_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def revision():
        return measure("sizes", "pytest", ROWS, packages=()).revision

    def git(*words):
        who = [
            "-c",
            "user.name=test",
            "-c",
            "user.email=test@example.org",
            "-c",
            "commit.gpgsign=false",
        ]
        done = subprocess.run(
            ["git", *who, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert revision() == "unknown (no git checkout)"
    (tmp_path / "code.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert revision() == head[:12]
    (tmp_path / "notes.txt").write_text("not part of the code\n")
    assert revision() == head[:12]
    (tmp_path / "code.py").write_text("a = 2\n")
    assert revision() == head[:12] + "+changes"
