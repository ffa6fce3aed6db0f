"""The runs of a study: several at a time, each kept in a file, so that a study that was stopped goes on."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

from moe_course import records
from moe_course.processes import end_with_parent

Item = TypeVar("Item")


def kept(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file, if it is there. Raises ValueError when it belongs to something else than `identity`."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    # Through JSON, where a tuple is a list.
    if {key: result.get(key) for key in identity} != json.loads(json.dumps(identity)):
        raise ValueError(f"{path} is of another setup: choose another folder")
    return result


def made(
    path: Path, identity: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Read a run's result, or make it on one thread and keep it, with what identifies it."""
    found = kept(path, identity)
    if found is None:
        torch.set_num_threads(1)
        found = identity | make()
        records.write_json(found, path)
    return found


def side_by_side(work: Callable[[Item], Any], items: Sequence[Item], jobs: int) -> None:
    """Call work(item) for each, `jobs` at a time in processes of their own, with a line of progress.

    Whatever goes wrong, no process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    begin = time.monotonic()
    with ProcessPoolExecutor(jobs, context, end_with_parent) as pool:
        waiting = [pool.submit(work, item) for item in items]
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                spent = time.monotonic() - begin
                left = spent / done * (len(items) - done) / 60
                line = f"{done} of {len(items)} runs, about {left:.0f} min left"
                print(f"\r{line:<50}", end="", file=sys.stderr, flush=True)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    print(file=sys.stderr)


def command_line(
    module: str,
    name: str,
    folder: Path,
    record: Path,
    rows: Callable[[Path, int], list[dict[str, Any]]],
    arguments: Sequence[str] | None = None,
) -> int:
    """`python -m module [--out FOLDER] [--record FILE] [--jobs N]`: make the rows and record them; an exit status.

    rows: called with the folder of the runs and the number of processes.
    """
    command = f"python -m {module}"
    parser = argparse.ArgumentParser(prog=command)
    parser.add_argument("--out", type=Path, default=folder, help="folder of the runs")
    parser.add_argument("--record", type=Path, default=record)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    try:
        found = rows(options.out, options.jobs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nstopped; the same command goes on from {options.out}", file=sys.stderr
        )
        return 130
    records.save(records.measure(name, command, found), options.record)
    print(f"{options.record}: {len(found)} rows")
    return 0
