"""Tiles by the clock, instead of by the table: MOE_COURSE_AUTOTUNE=1.

The first layer of a kind (device, dtype, sizes, rows per expert up to a power of 2) is run, forward and backward, with
each of a few alternatives. The answer is kept in a file in the user's cache folder: the next process need not ask.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from torch._guards import detect_fake_mode

from moe_course.kernels import tiles
from moe_course.kernels.tiles import Tile, Tiles
from moe_course.records import write_json

Timer = Callable[[Tiles], float]
_answers: dict[str, Tiles] = {}  # of this process
_trial: Tiles | None = None  # what is being timed


def cache_file() -> Path:
    """$XDG_CACHE_HOME/moe_course/tiles.json, or in ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "moe_course" / "tiles.json"


def _read(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """What is stored; nothing where the file is missing, broken or something else."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _known(stored: object, candidates: list[Tiles]) -> Tiles | None:
    """The stored answer, if it is one that would be tried today."""
    try:
        found = Tiles(**{name: Tile(**tile) for name, tile in stored.items()})  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return None
    return found if found in candidates else None


def _time_or_never(timer: Timer, candidate: Tiles) -> float:
    """A candidate that does not compile or fit loses."""
    try:
        return timer(candidate)
    except Exception:
        return math.inf


def best(key: str, candidates: list[Tiles], timer: Timer, path: Path) -> Tiles:
    """The fastest candidate, from memory, from the file, or timed now. Ties and failures fall to the first."""
    found = _answers.get(key) or _known(_read(path).get(key), candidates)
    if found is None:
        times = [_time_or_never(timer, candidate) for candidate in candidates]
        found = candidates[times.index(min(times))]
        if min(times) < math.inf:
            with suppress(OSError):  # a cache that cannot be written is none
                write_json(_read(path) | {key: asdict(found)}, path)
    _answers[key] = found
    return found


def choose(
    slots: int,
    num_experts: int,
    width: int,
    hidden: int,
    halves: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tiles:
    """`tiles.choose`, timed."""
    if _trial is not None:
        return _trial
    rows = triton.next_power_of_2(max(1, triton.cdiv(slots, num_experts)))
    key = (
        f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {dtype}, D{width} F{hidden} "
        f"E{num_experts} halves {halves} rows {rows}"
    )
    found = tiles.candidates(slots, num_experts, width, hidden, halves, dtype, device)
    if detect_fake_mode() or torch.cuda.is_current_stream_capturing():
        # Nothing can be timed now; and what has been traced must not change later in this process.
        return _answers.setdefault(key, found[0])

    def timer(candidate: Tiles) -> float:
        return _time_layer(
            candidate, slots, num_experts, width, hidden, halves, dtype, device
        )

    return best(key, found, timer, cache_file())


def _time_layer(
    candidate: Tiles,
    slots: int,
    num_experts: int,
    width: int,
    hidden: int,
    halves: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Milliseconds of a layer of that size, forward and backward, on random tokens that want random experts."""
    global _trial
    from moe_course.kernels.fused_moe import backward, forward

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    generator_state = torch.cuda.get_rng_state(device)
    x, weights = random(slots, width), random(slots, 1)
    w_up, w_down = (
        random(num_experts, halves * hidden, width),
        random(num_experts, width, hidden),
    )
    ids = torch.randint(num_experts, (slots, 1), dtype=torch.int32, device=device)
    torch.cuda.set_rng_state(generator_state, device)
    activation = "swiglu" if halves == 2 else "relu"

    def layer() -> None:
        y, saved = forward(x, w_up, w_down, ids, weights, None, None, activation, True)
        backward(y, x, w_up, w_down, weights, None, saved, activation, False)

    _trial = candidate
    try:
        return float(
            triton.testing.do_bench(layer, warmup=10, rep=50, return_mode="median")
        )
    finally:
        _trial = None
