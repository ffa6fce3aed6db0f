"""A class: one result each, resumed after a kill, tables and pages that no student can break."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from hostile import solution

from moe_course import cli
from moe_course.grading import batch, report, sandbox
from moe_course.grading.batch import GradesError, Settings
from moe_course.grading.core import load_exercise
from moe_course.grading.judge import GRADED, NEEDS_REVIEW, Verdict, nothing_graded
from moe_course.grading.submissions import Submission

ROOT = Path(__file__).parents[2]
SCRIPT = "<script>alert(1)</script>"


def notebook(answers=(), number="01", last=""):
    """A worked solution with some answers replaced."""
    cells = [dict(answers).get(tag, source) for tag, source in solution(number)]
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in [*cells, last]],
        metadata={"moe_course": {"exercise": number}},
    )
    return nbformat.writes(made)


def wrong(question, name, body="return 1"):
    return {question: f"def {name}(*args, **kwargs):\n    {body}\n"}


@pytest.fixture(scope="module")
def _sandboxed():
    reason = sandbox.why_not()
    if reason is not None:
        pytest.skip(f"no sandbox here: {reason}")


@pytest.fixture
def klass(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "ada.ipynb").write_text(notebook())
    (folder / "ben.ipynb").write_text(notebook(wrong("01.6", "active_at")))
    raising = wrong("01.6", "active_at", f"raise ValueError({SCRIPT!r})")
    (folder / "cleo.ipynb").write_text(notebook(raising))
    (folder / "dan.ipynb").write_text("not a notebook")
    (folder / "=1+1.ipynb").write_text(
        notebook(wrong("01.6", "active_at", "import os; os._exit(0)"))
    )
    return folder


def read(out):
    with (out / "grades.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read(out)]


def points(rows):
    total = {}
    for row in rows:
        total[row["student"]] = total.get(row["student"], 0) + int(row["points"])
    return total


class Balanced(HTMLParser):
    """Every tag that opens closes, and no script is among them."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def text_of(page):
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return "".join(parser.text)


@pytest.mark.usefixtures("_sandboxed")
def test_a_class_from_the_command_line(klass, tmp_path, capsys, monkeypatch):
    out = tmp_path / "grades"
    words = ["grade", str(klass), "--exercise", "01", "-o", str(out), "-j", "2"]
    words += ["--seed", "secret"]
    assert cli.main(words) == 0
    assert (
        "5 submissions: 3 graded, 1 needs-review, 1 unreadable"
        in capsys.readouterr().out
    )
    rows = read(out)
    questions = load_exercise("01").questions
    assert len(rows) == 5 * len(questions)
    lost = {"ben": 3, "cleo": 3, "dan": 20, "'=1+1": 3, "ada": 0}
    assert points(rows) == {name: 20 - n for name, n in lost.items()}
    assert all(row["reason"] for row in rows if row["points"] == "0")
    assert {r["status"] for r in rows if r["student"] == "dan"} == {"unreadable"}
    assert {r["status"] for r in rows if r["student"] == "ada"} == {"graded"}
    review = [r["question"] for r in rows if r["status"] == "needs-review"]
    assert review == ["01.6"]
    assert len(json.loads((out / "grades.json").read_text())) == 5

    pages = {p.name: p.read_text() for p in (out / "feedback").iterdir()}
    assert len(pages) == 5
    cleo = text_of(pages[report.feedback_name("cleo")])
    assert SCRIPT in cleo  # as text
    assert "17 of 20 points" in cleo
    summary = text_of((out / "summary.html").read_text())
    for words_shown in (
        "5 submissions",
        "ada",
        "For a person to look at",
        "Failed most often",
    ):
        assert words_shown in summary
    # The unreadable one is in no mean; what a person has to look at names its question.
    means = re.findall(r"(01\.\d) \w+(\d\.\d\d)", summary)
    assert [mean for question, mean in means if question == "01.1"] == ["2.00"]
    assert [mean for question, mean in means if question == "01.6"] == ["0.75"]
    assert "01.6: ended the process" in summary
    for page in [*pages.values(), (out / "summary.html").read_text()]:
        assert "http" not in page.replace("http-equiv", "")
        text_of(page)

    # Again: nothing is graded twice, and what is settled by hand stays.
    before = {p: p.stat().st_mtime_ns for p in (out / "results").iterdir()}
    decisions = tmp_path / "overrides.csv"
    decisions.write_text("student,question,points,reason\n=1+1,01.6,2,a slip\n")
    assert cli.main([*words, "--overrides", str(decisions)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "results").iterdir()} == before
    assert "4 graded, 1 unreadable" in capsys.readouterr().out
    assert points(read(out))["'=1+1"] == 19
    (settled,) = [
        r for r in read(out) if (r["student"], r["question"]) == ("'=1+1", "01.6")
    ]
    assert (settled["status"], settled["reason"]) == ("graded", "set by hand: a slip")

    # A submission that changed is graded again, and it alone.
    (klass / "ben.ipynb").write_text(notebook())
    assert cli.main(words) == 0
    after = {p: p.stat().st_mtime_ns for p in (out / "results").iterdir()}
    assert sum(after[p] != before[p] for p in before) == 1
    assert points(read(out))["ben"] == 20


@pytest.mark.usefixtures("_sandboxed")
def test_every_odd_file_has_one_result(tmp_path, capsys):
    folder = tmp_path / "odd"
    folder.mkdir()
    whole = notebook()
    odd = json.loads(whole)
    odd["metadata"]["kernelspec"] = {"name": "julia-1.10", "display_name": "Julia"}
    for cell in odd["cells"]:
        cell["id"] = "same"
    (folder / "kernel and ids.ipynb").write_text(json.dumps(odd))
    (folder / "cut.ipynb").write_text(whole[: len(whole) // 2])
    (folder / "empty.ipynb").write_text("")
    (folder / "latin.ipynb").write_bytes(whole.encode() + b"\xe9")
    (folder / "list.ipynb").write_text("[1, 2]")
    (folder / "other.ipynb").write_text(notebook(number="02"))
    with (folder / "large.ipynb").open("wb") as file:
        file.truncate(300_000_000)
    (folder / "link.ipynb").symlink_to("/etc/passwd")
    (folder / "folder.ipynb").mkdir()
    bomb = bytes(30 * 2**20)
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../up.ipynb", "{}")
        archive.writestr("bomb.ipynb", bomb)
    out = tmp_path / "grades"
    assert cli.main(["grade", str(folder), "--exercise", "01", "-o", str(out)]) == 0
    assert "11 submissions: 1 graded, 10 unreadable" in capsys.readouterr().out
    rows = read(out)
    assert len(rows) == 11 * 7
    assert points(rows).pop("kernel and ids") == 20
    reasons = {r["student"]: r["reason"] for r in rows if r["status"] == "unreadable"}
    assert len(reasons) == 10
    assert all(reasons.values())
    assert not (tmp_path / "up.ipynb").exists()
    assert "exercise 02, not 01" in reasons["other"]
    assert "20 MiB" in reasons["large"]
    assert "20 MiB" in reasons["bomb"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.thorough)])
@pytest.mark.usefixtures("_sandboxed")
def test_a_killed_batch_goes_on_and_ends_as_if_it_had_not_been(klass, tmp_path, kills):
    """At any moment: while Python starts, while processes do, between results, while tables are written."""
    if kills > 3:  # enough work that every kill has something to interrupt
        for n in range(2 * kills):
            text = (klass / ("ben" if n % 2 else "ada")).with_suffix(".ipynb")
            (klass / f"s{n}.ipynb").write_text(text.read_text())
    words = [sys.executable, "-m", "moe_course.cli", "grade", str(klass)]
    words += ["--exercise", "01", "-j", "2", "-o"]
    subprocess.run([*words, str(tmp_path / "whole")], check=True, capture_output=True)
    rng = random.Random(0)
    out = tmp_path / "killed"
    done: dict[Path, int] = {}
    started: set[int] = set()
    for _ in range(kills):
        command = subprocess.Popen(
            [*words, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(1, 12))
        started.update(sandbox.descendants(command.pid))
        command.send_signal(signal.SIGKILL)
        command.wait()
        for path in out.glob("results/*.json"):
            json.loads(path.read_text())  # whole, or not there
            when = path.stat().st_mtime_ns
            assert done.setdefault(path, when) == when  # nothing is graded twice
    subprocess.run([*words, str(out)], check=True, capture_output=True)
    assert without_seconds(out) == without_seconds(tmp_path / "whole")
    for path, when in done.items():
        assert path.stat().st_mtime_ns == when
    # What the killed ones left running ends by itself.
    patience = time.monotonic() + 20
    while any(map(sandbox.runs, started)):
        assert time.monotonic() < patience
        time.sleep(0.2)


PRIVATE = """
from moe_course.grading.core import Invariant, Failure
def test(answer, rng):
    if answer(total=100, active=40, experts=8, k=2, new_k=3) != 50:
        raise Failure("a hidden case")
PRIVATE = {"01.6": (Invariant("holds in a case of our own", 2, test, "look again"),)}
"""


def grade_here(submissions, settings, out, **options):
    with ThreadPoolExecutor(1) as pool:
        graded = batch.grade_batch(submissions, settings, out, pool, 1, **options)
    batch.close_spare()
    return graded


@pytest.mark.usefixtures("_sandboxed")
def test_private_checks_count_and_change_what_is_regraded(tmp_path):
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "01_concepts.py").write_text(PRIVATE)
    one = Submission("ada", "ada.ipynb", notebook().encode())
    out = tmp_path / "out"
    grade_here([one], Settings("01"), out)
    settings = Settings("01", private=batch.read_private(folder, "01"))
    graded = grade_here([one], settings, out)
    ((_, result),) = batch.rows(graded, settings, out)
    assert result.points == 22
    assert "hidden case" not in json.dumps(result.verdicts[0].lines)
    with pytest.raises(GradesError, match="ada has no result"):
        list(batch.rows(graded, Settings("01"), out))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("PRIVATE = 3", "TypeError"),
        ("PRIVATE = {'09.1': ()}", "no question '09.1'"),
        ("PRIVATE = {'01.6': (3,)}", "no Invariant"),
        ("import nowhere", "ModuleNotFoundError"),
    ],
)
def test_private_checks_that_are_none_are_refused(tmp_path, text, says, capsys):
    (tmp_path / "01_concepts.py").write_text(text)
    with pytest.raises(ValueError, match=says):
        Settings("01", private=text).private_checks()
    words = ["grade", str(tmp_path), "--exercise", "01", "-o", str(tmp_path / "o")]
    assert cli.main([*words, "--private-checks", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_private_checks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"01_concepts\.py: no private checks"):
        batch.read_private(tmp_path, "01")


@pytest.mark.usefixtures("_sandboxed")
def test_a_cluster_grades_the_same(klass, tmp_path, capsys):
    """A real scheduler with two workers, on this machine."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=2, dashboard_address=None, protocol="tcp://"
    ) as cluster:
        words = ["grade", str(klass), "--exercise", "01", "-o", str(tmp_path / "far")]
        assert cli.main([*words, "--scheduler", cluster.scheduler_address]) == 0
    words[-1] = str(tmp_path / "near")
    assert cli.main(words) == 0
    assert without_seconds(tmp_path / "far") == without_seconds(tmp_path / "near")
    assert cli.main([*words, "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "no scheduler at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_settings_tell_when_to_grade_again():
    digests = {
        Settings("01").digest,
        Settings("02").digest,
        Settings("01", seed="x").digest,
        Settings("01", sandboxed=False).digest,
        Settings("01", limits=sandbox.Limits(call_seconds=1)).digest,
    }
    assert len(digests) == 5
    assert Settings("01").digest == Settings("01").digest


# --- Without a sandbox: nothing below runs a submission --------------------------------


def students(*names):
    return [
        Submission(name, f"{name}.ipynb", reason="cannot be read") for name in names
    ]


def test_results_that_cannot_be_written_are_an_error_that_keeps_the_others(
    tmp_path, monkeypatch
):
    out, settings = tmp_path / "out", Settings("01")
    grade_here(students("ada"), settings, out)

    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GradesError, match="No space left on device"):
        grade_here(students("ada", "ben"), settings, out)
    monkeypatch.undo()
    assert [p.suffix for p in (out / "results").iterdir()] == [".json"]
    seen = []
    grade_here(
        students("ada", "ben"),
        settings,
        out,
        on_done=lambda s, _, stored: seen.append((s.student, stored)),
    )
    assert seen == [("ada", True), ("ben", False)]


def test_memory_does_not_grow_with_the_class(tmp_path):
    """A thousand submissions of 300 kB are 300 MB: one after the other, they never lie in memory together."""
    large = b"[" + b" " * 300_000
    many = (Submission(f"s{n}", f"s{n}.ipynb", large + b"%d" % n) for n in range(1000))
    tracemalloc.start()
    graded = grade_here(many, Settings("01"), tmp_path)
    for name, parts in (("table", batch.table), ("json", batch.as_json)):
        rows = batch.rows(graded, Settings("01"), tmp_path)
        batch.write(tmp_path / name, parts(rows))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6
    assert len(json.loads((tmp_path / "json").read_text())) == 1000
    assert (tmp_path / "table").read_text().count("\n") == 1 + 7 * 1000


def test_a_damaged_result_is_made_again(tmp_path):
    out, settings = tmp_path / "out", Settings("01")
    grade_here(students("ada"), settings, out)
    (path,) = (out / "results").iterdir()
    whole = path.read_text()
    for broken in (whole[:50], "[]", "{}", whole.replace('"verdicts"', '"v"')):
        path.write_text(broken)
        grade_here(students("ada"), settings, out)
        assert path.read_text() == whole


def test_a_judge_that_fails_is_not_the_students_fault(tmp_path):
    class Broken(ThreadPoolExecutor):
        def submit(self, *_args, **_kwargs):
            return super().submit(lambda: 1 / 0)

    with Broken(1) as pool:
        graded = batch.grade_batch(students("ada"), Settings("01"), tmp_path, pool, 1)
    ((_, result),) = batch.rows(graded, Settings("01"), tmp_path)
    assert result.status == NEEDS_REVIEW
    assert "the judge itself failed (ZeroDivisionError" in result.reason
    # The next run, on a machine in order, tries again.
    graded = grade_here(students("ada"), Settings("01"), tmp_path)
    ((_, result),) = batch.rows(graded, Settings("01"), tmp_path)
    assert result.status == "unreadable"


def test_processes_that_are_gone_are_an_error_that_can_be_resumed(tmp_path):
    class Dying(ThreadPoolExecutor):
        def submit(self, *_args, **_kwargs):
            def die():
                raise BrokenExecutor("a child process terminated abruptly")

            return super().submit(die)

    class Dead(ThreadPoolExecutor):
        def submit(self, *_args, **_kwargs):
            raise BrokenExecutor("cannot schedule new futures")

    settings = Settings("01")
    grade_here(students("ada"), settings, tmp_path)
    for kind in (Dying, Dead):
        with (
            kind(1) as pool,
            pytest.raises(GradesError, match="the same command goes on"),
        ):
            batch.grade_batch(students("ada", "ben"), settings, tmp_path, pool, 1)
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_a_worker_in_waiting_serves_the_settings_that_it_was_started_for(monkeypatch):
    """One that was started without a sandbox must never run a submission that is to have one."""
    started = []

    class Fake:
        def __init__(self, limits, user, unsafe):
            self.unsafe, self.closed = unsafe, False
            started.append(self)

        def close(self):
            self.closed = True

    monkeypatch.setattr(batch, "Sandbox", Fake)
    batch.close_spare()
    walls, none = Settings("01"), Settings("01", sandboxed=False)
    assert batch._fresh(none).unsafe
    waiting = started[-1]
    assert waiting.unsafe
    assert not batch._fresh(walls).unsafe
    assert waiting.closed
    assert batch._fresh(walls) is started[3]  # the one in waiting, this time
    batch.close_spare()
    assert started[-1].closed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("student,points\n", "needs the columns"),
        (
            "student,question,points,reason\na,09.1,1,x\n",
            "line 2: there is no question '09.1'",
        ),
        (
            "student,question,points,reason\na,01.1,3,x\n",
            "line 2: points must be 0 to 2, got '3'",
        ),
        ("student,question,points,reason\na,01.1,-1,x\n", "got '-1'"),
        ("student,question,points,reason\na,01.1,,x\n", "got ''"),
    ],
)
def test_overrides_that_cannot_be_followed_name_their_line(tmp_path, text, says):
    path = tmp_path / "overrides.csv"
    path.write_text(text)
    most = {q.id: q.points for q in load_exercise("01").questions}
    with pytest.raises(GradesError, match=says):
        batch.read_overrides(path, most)
    with pytest.raises(GradesError, match="cannot read"):
        batch.read_overrides(tmp_path / "gone.csv", most)


def test_a_table_that_a_spreadsheet_may_open():
    result = nothing_graded("01", "unreadable", "=HYPERLINK(1)\nsecond line")
    table = "".join(batch.table([("@sum", result)]))
    row = next(csv.DictReader(io.StringIO(table)))
    assert row["student"] == "'@sum"
    assert row["reason"] == "'=HYPERLINK(1) second line"


def test_what_students_write_is_escaped_everywhere():
    line = {
        "name": "n",
        "status": "failed",
        "points": 1,
        "detail": SCRIPT,
        "hint": SCRIPT,
    }
    verdict = Verdict("01.1", "t", 0, 2, GRADED, SCRIPT, 0.0, (line,))
    result = nothing_graded("01", "needs-review", SCRIPT)
    exercise = load_exercise("01")
    from dataclasses import replace

    result = replace(result, verdicts=(verdict,), troubles=(SCRIPT,), sandboxed=False)
    page = report.feedback(f"{SCRIPT}\"'", result, exercise)
    assert text_of(page).count(SCRIPT) >= 5
    summary = report.Summary(exercise)
    summary.add(SCRIPT, result)
    assert text_of(summary.page()).count(SCRIPT) == 3
    assert "/" not in report.feedback_name("../../etc/passwd").removesuffix(".html")


def test_without_a_sandbox_nobodys_work_is_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.ipynb").write_text(notebook())
    monkeypatch.setattr(
        sandbox, "why_not", lambda: "the sandbox needs Linux and bubblewrap"
    )
    words = ["grade", str(tmp_path), "--exercise", "01", "-o", str(tmp_path / "out")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "needs Linux and bubblewrap" in said
    assert "--unsafe-no-sandbox" in said
    assert not (tmp_path / "out").exists()


def test_the_unsafe_way_works_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.ipynb").write_text(notebook())
    words = [
        "grade",
        str(tmp_path),
        "--exercise",
        "01",
        "-o",
        str(tmp_path / "out"),
        "-j",
        "1",
    ]
    assert cli.main([*words, "--unsafe-no-sandbox"]) == 0
    (result,) = json.loads((tmp_path / "out" / "grades.json").read_text())
    assert result["sandboxed"] is False
    assert sum(v["points"] for v in result["verdicts"]) == 20
    assert "without a sandbox" in (tmp_path / "out" / "summary.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--exercise", "77", "-o", "x"], "there is no exercise '77'"),
        (["--exercise", "01", "-o", "x", "-j", "0"], "-j must be at least 1"),
    ],
)
def test_a_command_that_cannot_be_followed(tmp_path, capsys, words, says):
    (tmp_path / "a.ipynb").write_text("{}")
    assert cli.main(["grade", str(tmp_path), *words]) == 2
    assert says in capsys.readouterr().err
    assert (
        cli.main(["grade", str(tmp_path / "gone"), "--exercise", "01", "-o", "x"]) == 2
    )
    assert "no such file" in capsys.readouterr().err
