"""Several ranks: `run_ranks` starts them here, from a notebook or a test; where torchrun started them, on one machine
or on many, each enters by `torchrun_ranks`.

Chapter: book/bandwidth/cluster.
"""

from __future__ import annotations

import io
import os
import re
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
        # The store itself, not a file:// address: a folder's name may hold spaces, or begin with a drive.
        shared = dist.FileStore(store, ranks)  # type: ignore[attr-defined]
        dist.init_process_group(
            "gloo", store=shared, rank=rank, world_size=ranks,
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
    ended and RuntimeError says which and why; nothing hangs. Raises ValueError on a function that no other process can
    import.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    main = sys.modules["__main__"]
    if function.__module__ == "__main__" and not hasattr(main, "__file__"):
        raise ValueError(
            f"{function.__qualname__} is defined in a notebook or a session, where other processes cannot import "
            "it: put it into a module"
        )
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], []
        patience = 0.0  # whoever still works when something fails is ended at once
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
            answers = _collect(pipes, timeout)
            patience = 5.0
            return answers
        finally:
            for process in processes:
                process.join(patience)
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


@dataclass(frozen=True)
class Place:
    """Where a rank computes, and the group through which it sends tensors that lie there."""

    rank: int
    ranks: int
    device: torch.device
    group: dist.ProcessGroup | None  # None: the default group

    @property
    def backend(self) -> str:
        return str(dist.get_backend(self.group))


@contextmanager
def torchrun_ranks(timeout: float = 60.0) -> Iterator[Place]:
    """Join the group that torchrun's environment describes; leave it at the end.

        with torchrun_ranks() as place:
            ...

    NCCL and a GPU each where every rank of every machine has a GPU of its own, otherwise gloo and CPUs. timeout:
    seconds that the others may let this rank wait in one operation.

    An error inside ends this process with status 1 and one sentence that names the rank; torchrun then ends the others.
    Raises ValueError where torchrun's variables are missing.
    """
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set: start this with torchrun (python -m torch.distributed.run)"
        )
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        # Gloo first, everywhere: the ranks have to agree on NCCL before anyone uses it.
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        yield _seat(timeout)
        dist.destroy_process_group()
    except Exception as error:
        sys.stdout.flush()
        where = f"rank {rank} of {ranks} on {socket.gethostname()}"
        print(f"{where}: {_sentence(error, timeout)}", file=sys.stderr, flush=True)
        os._exit(1)  # a group that others wait in cannot be left in good order


def _seat(timeout: float) -> Place:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    local = int(os.environ["LOCAL_RANK"])
    mine = torch.cuda.is_available() and local < torch.cuda.device_count()
    everybody: list[Any] = [None] * ranks
    dist.all_gather_object(everybody, mine and dist.is_nccl_available())
    if not all(everybody):
        return Place(rank, ranks, torch.device("cpu"), None)
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)  # before NCCL is told of anything
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout))
    return Place(rank, ranks, device, group)


def _sentence(error: Exception, timeout: float) -> str:
    """One line on what went wrong; gloo's own words about a lost peer are of sockets."""
    lines = str(error).strip().splitlines() or [""]
    # Less the place in gloo's source, and less its advice.
    first = re.sub(r"^\[\S+\.cc:\d+\] ", "", lines[0]).split(". This is typically")[0]
    said = f"{type(error).__name__}: {first}"
    low = said.lower()
    if "timed out" in low or "timeout" in low:
        return f"another rank did not answer within {timeout:g} s ({said})"
    if "connection" in low or "socket" in low or "broken pipe" in low:
        return f"another rank is gone ({said})"
    return said
