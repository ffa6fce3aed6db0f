"""Grading a class: submissions a minute and peak memory, against `otter run` on the same notebooks and checks.

    python -m venv otter-env && otter-env/bin/pip install otter-grader==7.0.0 -c constraints.txt ".[exercises]"
    python benchmarks/grading.py --otter otter-env/bin/otter [--students 200] [--jobs 2] [--record]

The class is `moe_course.grading.sample`'s without its trouble-makers, whom otter has no answer to (an endless loop
stops it for ever): half hand in exercise 01, which needs no torch, half 02, which does. Otter's tests are doctests that
call the course's own checks. Each half is graded in two batches, in which the two take turns at being first; what a
batch needs to start counts. Ours runs each submission in a sandbox of its own; otter in a process with the grader's
rights. Memory is the largest sum of what all processes of a batch held at one time (Pss), looked at every 0.3 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_course import records
from moe_course.grading.core import load_exercise
from moe_course.grading.sample import write_class
from moe_course.grading.sandbox import descendants, memory_of

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "moe_course/data/records/grading_cpu.json"
EXERCISES = ["01", "02"]
SEED = "a seed"
PARTS = 2
GIB = 2**30


class PeakMemory:
    """The largest sum of memory of all processes below this one."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.3):
            self.peak = max(self.peak, memory_of(descendants(os.getpid())))

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def otter_zip(exercise: str, path: Path) -> None:
    """An autograder of otter's, one test for each question, that calls our checks."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("otter_config.json", json.dumps({"seed": 0}))
        for question in load_exercise(exercise).questions:
            code = (
                ">>> from moe_course.grading.core import grade, load_exercise\n"
                f">>> question = load_exercise('{exercise}').question('{question.id}')\n"
                f">>> grade(question, {question.answer}, seed='{SEED}/{question.id}').full\n"
                "True"
            )
            cases = [{"code": code, "hidden": False, "locked": False}]
            suite = {"cases": cases, "scored": True, "type": "doctest"}
            suite |= {"setup": "", "teardown": ""}
            test = {"name": question.id, "points": question.points, "suites": [suite]}
            text = f"OK_FORMAT = True\ntest = {test!r}\n"
            archive.writestr(f"tests/q{question.id.replace('.', '_')}.py", text)


def run_otter(
    otter: str, archive: Path, files: list[Path], out: Path, jobs: int
) -> dict[str, float]:
    """Points by student."""

    def one(path: Path) -> tuple[str, float]:
        place = out / path.stem
        place.mkdir(parents=True)
        words = [
            otter,
            "run",
            "-a",
            str(archive),
            "-o",
            str(place),
            "--no-logo",
            str(path),
        ]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=place, timeout=300
        )
        results = place / "results.json"
        if not results.exists():
            raise RuntimeError(
                f"otter gave no result: {done.stdout[-500:]}{done.stderr[-1500:]}"
            )
        tests = json.loads(results.read_text())["tests"]
        return path.stem, sum(
            t["score"] for t in tests if "." in t["name"] or t["name"].startswith("q")
        )

    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(one, files))


def run_ours(exercise: str, files: list[Path], out: Path, jobs: int) -> dict[str, int]:
    """Questions with full points, by student, in points."""
    words = [sys.executable, "-m", "moe_course.cli", "grade", *map(str, files)]
    words += ["--exercise", exercise, "-o", str(out), "-j", str(jobs), "--seed", SEED]
    subprocess.run(words, check=True, capture_output=True)
    results = json.loads((out / "grades.json").read_text())
    # Otter knows all or nothing of a question: compared is what both know.
    return {
        r["student"]: sum(
            v["points"] for v in r["verdicts"] if v["points"] == v["out_of"]
        )
        for r in results
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--otter", help="the command of an environment of its own")
    parser.add_argument("--students", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    otter = args.otter or shutil.which("otter")
    if not otter:
        sys.exit(
            "--otter is needed: the path of otter's command, see the top of this file"
        )
    # Of its environment, not ours.
    told = "from importlib.metadata import version; print(version('otter-grader'))"
    python = Path(otter).with_name("python")
    version = subprocess.check_output([python, "-c", told], text=True).strip()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for exercise in EXERCISES:
            each = args.students // len(EXERCISES)
            files = write_class(
                ROOT, place / f"class{exercise}", exercise, each, 0, False
            )
            archive = place / f"otter{exercise}.zip"
            otter_zip(exercise, archive)
            seconds: dict[str, list[float]] = {"ours": [], "otter": []}
            peaks: dict[str, list[float]] = {"ours": [], "otter": []}
            for part in range(PARTS):
                some = files[part::PARTS]
                found: dict[str, Any] = {}
                order = ["ours", "otter"] if part % 2 else ["otter", "ours"]
                for who in order:
                    begin = time.monotonic()
                    with PeakMemory() as memory:
                        out = place / f"{who}{exercise}{part}"
                        found[who] = (
                            run_ours(exercise, some, out, args.jobs)
                            if who == "ours"
                            else run_otter(otter, archive, some, out, args.jobs)
                        )
                    seconds[who].append((time.monotonic() - begin) / len(some))
                    peaks[who].append(memory.peak)
                apart = [
                    n for n in found["ours"] if found["ours"][n] != found["otter"][n]
                ]
                print(f"{exercise} part {part}: seconds each, ours {seconds['ours'][-1]:.2f}, "
                      f"otter {seconds['otter'][-1]:.2f}; marked differently: {apart}", flush=True)  # fmt: skip
            ratios = [
                b / a for a, b in zip(seconds["ours"], seconds["otter"], strict=True)
            ]
            rows.append(
                {
                    "exercise": exercise,
                    "submissions": len(files),
                    "jobs": args.jobs,
                    "ours_per_minute": round(
                        60 / statistics.median(seconds["ours"]), 1
                    ),
                    "otter_per_minute": round(
                        60 / statistics.median(seconds["otter"]), 1
                    ),
                    "ratio": round(statistics.median(ratios), 2),
                    "ratio_min": round(min(ratios), 2),
                    "ratio_max": round(max(ratios), 2),
                    "ours_peak_gib": round(max(peaks["ours"]) / GIB, 2),
                    "otter_peak_gib": round(max(peaks["otter"]) / GIB, 2),
                }
            )
            print(rows[-1], flush=True)
    if args.record:
        command = f"python benchmarks/grading.py --students {args.students} --record"
        record = records.measure("grading_cpu", command, rows)
        record.versions["otter-grader"] = version
        records.save(record, RECORD)


if __name__ == "__main__":
    main()
