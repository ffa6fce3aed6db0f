"""Several ranks on this machine, from a notebook or a test; on many machines torchrun starts them instead."""

from __future__ import annotations

import io
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_course.processes import end_with_parent


def _packed(value: Any) -> bytes:
    # Whole: what torch sends by itself is a handle to memory of a process that ends.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    store: str,
    timeout: float,
    words: tuple[Any, ...],
    answer: Connection,
) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        answer.send((True, _packed(function(*words))))
        dist.destroy_process_group()
    except BaseException as error:
        answer.send(
            (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        )
        answer.close()
        os._exit(1)  # a group that others wait in cannot be left in good order


def run_ranks(
    function: Callable[..., Any], ranks: int, *words: Any, timeout: float = 60.0
) -> list[Any]:
    """Call function(*words) in `ranks` fresh processes that form a gloo group; returns what each returned, by rank.

    `function` must be importable from a module (a process of its own imports it). timeout: seconds that one collective
    operation, and that all of it once the first rank is done, may take. When a rank fails or dies, the others are
    ended and RuntimeError says which and why; nothing hangs.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], []
        try:
            for rank in range(ranks):
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank,
                    args=(function, rank, ranks, store, timeout, words, theirs),
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(mine)
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    deadline = None
    while len(answers) < len(pipes):
        waiting = [p for r, p in enumerate(pipes) if r not in answers]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(waiting, left)
        if not ready:
            late = [r for r in range(len(pipes)) if r not in answers]
            raise RuntimeError(
                f"ranks {late} did not finish within {timeout:g} s of the first"
            )
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipes[rank].recv()
            except EOFError:
                raise RuntimeError(
                    f"rank {rank} died without a word (killed, or out of memory?)"
                ) from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed: {value}")
            answers[rank] = torch.load(io.BytesIO(value), weights_only=False)
        if deadline is None:
            deadline = time.monotonic() + timeout
    return [answers[rank] for rank in range(len(pipes))]
