"""The runs of a study: several at a time, each kept in a file, so that a study that was stopped goes on."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

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
