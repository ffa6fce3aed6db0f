"""What torchrun starts in tests/test_parallel.py: ranks of which the last goes wrong in the way that is asked for."""

from __future__ import annotations

import os
import sys
import time

import ranks
import torch
import torch.distributed as dist

from moe_course.parallel import torchrun_ranks


def go_wrong(how: str) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        if how == "kill":
            os.kill(os.getpid(), 9)
        if how == "raise":
            raise ZeroDivisionError("on purpose")
        if how == "sleep":
            time.sleep(600)
    if how == "shape":
        ranks.mismatched()
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    with torchrun_ranks(timeout=4.0):
        go_wrong(sys.argv[1])
