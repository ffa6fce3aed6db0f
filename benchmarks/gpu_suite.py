"""Prove and time the kernels on an NVIDIA GPU: what `make gpu` runs.

    python benchmarks/gpu_suite.py [--records DIR] [--budget 450] [--dry-run]

Runs kernels_correct.py, then moe_kernels.py, within one budget of seconds, while the kernels of the benchmark are
compiled beside the proof, on the CPU's other cores. Fails if a check failed; the benchmark runs all the same.

Below are the pieces that both programs share: a worker process that may die or hang without taking the suite with it,
and compilation ahead of the first launch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_course import records

if "--dry-run" in sys.argv:  # before anything imports the kernels
    os.environ["TRITON_INTERPRET"] = "1"

Row = dict[str, Any]
HERE = Path(__file__).parent
RECORDS = Path("moe_course/data/records")
PACKAGES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "scattermoe")


# ---- A process that may die -------------------------------------------------------------------------------------


class Died(Exception):
    """The worker ended, hung or reported an error; says which."""


class Worker:
    """`command --worker`, started when first asked and again after a death. It does one named task after another."""

    def __init__(self, command: list[str]) -> None:
        self.command = [sys.executable, *command, "--worker"]
        self.process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(
            target=self._read, args=(self.process, self.lines), daemon=True
        ).start()
        return self.process

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def ask(self, task: str, seconds: float) -> Iterator[Row]:
        """The rows of a task, as they come. Raises Died after so many seconds, or when the task fails."""
        process = self.process or self._start()
        assert process.stdin is not None
        process.stdin.write(task + "\n")
        process.stdin.flush()
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                self.stop()
                raise Died(f"no end within {seconds:.0f} s") from None
            if line is None:
                code = process.wait()
                self.stop()
                raise Died(f"the process ended with code {code}")
            if not line.startswith("@"):
                print(line, end="", flush=True)
                continue
            row = json.loads(line[1:])
            if row.get("done"):
                return
            if "error" in row:
                if row["broken"]:
                    self.stop()
                raise Died(row["error"])
            yield row

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def serve(do: Callable[[str], Iterable[Row]]) -> None:
    """The worker's side: tasks in, rows out."""
    for line in sys.stdin:
        try:
            for row in do(line.strip()):
                print("@" + json.dumps(row), flush=True)
            answer: Row = {"done": True}
        except Exception as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            answer = {"error": words, "broken": _gpu_is_broken()}
        print("@" + json.dumps(answer), flush=True)


def _gpu_is_broken() -> bool:
    """After a fault on the device every call fails, in this process: it takes a new one."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# ---- Compilation ahead ------------------------------------------------------------------------------------------


def _compile(job: tuple[Callable[..., None], tuple[Any, ...]]) -> str | None:
    function, arguments = job
    try:
        function(*arguments)
    except Exception as error:  # it will be met again, and reported, where it runs
        return f"{function.__name__}{arguments}: {type(error).__name__}: {error}"[:300]
    return None


def precompile(jobs: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """Compile in parallel, without the GPU, into Triton's cache on disk, where the launches find it."""
    begin = time.monotonic()
    # Importing the kernels then asks no GPU whether to interpret.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    processes = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        faults = [f for f in pool.imap_unordered(_compile, jobs) if f is not None]
    del os.environ["TRITON_INTERPRET"]
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before
    for fault in faults:
        print("not compiled ahead:", fault)
    seconds = time.monotonic() - begin
    print(f"compiled ahead: {len(jobs)} jobs in {seconds:.0f} s", flush=True)


# ---- Records and tables -----------------------------------------------------------------------------------------


def save(name: str, command: str, rows: list[Row], folder: Path | None) -> None:
    """Write the rows so far, so that a run that is killed keeps them; nowhere if there is no folder."""
    if folder is None or not rows:
        return
    present = []
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            metadata.version(package)
            present.append(package)
    record = records.measure(name, command, rows, tuple(present))
    records.save(record, folder / f"{name}.json")


def table(rows: list[Row], columns: dict[str, str]) -> None:
    """Print rows: `columns` maps a key to its width and, for numbers, its format, as in "<20" or "8.1f"."""
    if not rows:
        return
    sides = {}
    for key, form in columns.items():
        width = form.strip("<").split(".")[0].rstrip("d")
        sides[key] = ("<" if "<" in form else ">") + width
    print(*(f"{key[: int(side[1:])]:{side}}" for key, side in sides.items()))
    for row in rows:
        cells = []
        for key, form in columns.items():
            value = row.get(key)
            text = "-" if value is None else value
            cells.append(f"{text:{sides[key] if isinstance(text, str) else form}}")
        print(*cells)


def arguments(description: str | None, budget: int) -> argparse.ArgumentParser:
    """The options that both programs and the suite share."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--records", type=Path, help="folder for the record")
    parser.add_argument("--budget", type=float, default=budget, help="seconds")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="a few tiny cases in Triton's interpreter, on the CPU",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parsed; without --dry-run there must be a GPU."""
    options = parser.parse_args()
    if options.dry_run:
        if options.records and options.records.resolve() == RECORDS.resolve():
            parser.error("a dry run does not write among the book's records")
        return options
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        sys.exit(
            "no NVIDIA GPU of compute capability 8.0 or newer here: nothing was run (--dry-run needs none)"
        )
    return options


def _failures(folder: Path | None) -> list[str]:
    """What failed, once more at the end."""
    path = (folder or Path()) / "kernels_gpu_correct.json"
    if folder is None or not path.exists():
        return ["see the checks above the benchmark"]
    rows = records.load(path).rows
    failed = [row for row in rows if row["ok"] is False]
    return [f"{row['check']} {row['case']}: {row['detail']}" for row in failed]


def main() -> None:
    parser = arguments(__doc__, budget=450)
    options = options_of(parser)
    begin = time.monotonic()
    shared = ["--dry-run"] if options.dry_run else []
    if options.records:
        shared += ["--records", str(options.records)]

    def command(script: str, *words: str) -> list[str]:
        return [sys.executable, str(HERE / script), *words, *shared]

    ahead = None
    if not options.dry_run:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command("kernels_correct.py", "--precompile"),
                timeout=0.25 * options.budget,
            )
        ahead = subprocess.Popen(command("moe_kernels.py", "--precompile"))
    # A third for the proof, more if compiling has taken most of that.
    share = max(60, 0.35 * options.budget - (time.monotonic() - begin))
    proof = subprocess.run(command("kernels_correct.py", "--budget", f"{share:.0f}"))
    if ahead is not None:
        try:
            ahead.wait(0.5 * options.budget - (time.monotonic() - begin))
        except subprocess.TimeoutExpired:
            print("compiling ahead took too long: the rest compiles as it is met")
            ahead.terminate()
    left = options.budget - (time.monotonic() - begin)
    timed = subprocess.run(command("moe_kernels.py", "--budget", f"{left:.0f}"))
    if proof.returncode:
        print("THE PROOF FAILED:", *_failures(options.records), sep="\n  ")
    print(f"{time.monotonic() - begin:.0f} s in all")
    sys.exit(proof.returncode or timed.returncode)


if __name__ == "__main__":
    main()
