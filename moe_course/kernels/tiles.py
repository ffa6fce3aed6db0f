"""How large a tile each kernel works on: a small table, by the rows that an expert has on average.

Chapter: book/kernels/fused_moe.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_course.kernels import INTERPRETED
from moe_course.kernels.routing import SortedSlots


@dataclass(frozen=True)
class Tile:
    """One program computes block_m rows by block_n columns at a time, block_k deep a step.

    block_n of the up-projection counts columns of the result: a gated activation needs twice as many weight rows.
    group_m: so many row tiles take turns on the same weight columns, which stay in the L2 cache meanwhile.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True)
class Tiles:
    """The tiles of one layer. The row kernels share block_m: they share the map from tiles to experts."""

    up: Tile
    down: Tile
    dact: Tile
    dx: Tile
    dw: Tile  # block_m by block_n of the weights, block_k rows a step

    def __post_init__(self) -> None:
        if len({t.block_m for t in (self.up, self.down, self.dact, self.dx)}) > 1:
            raise ValueError(f"the row kernels must share one block_m, got {self}")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; the interpreter does what the newest can."""
    if INTERPRETED or device.type != "cuda":
        return (9, 0)
    return torch.cuda.get_device_capability(device)


# Bytes of shared memory that one program may use, by compute capability.
SHARED_MEMORY = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448}


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3 if INTERPRETED else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def weights(w: Tensor, block: list[int]) -> tuple[Tensor | TensorDescriptor, bool]:
    """A tensor descriptor of the stacked weights where the hardware copies by descriptors (sm_90), else the tensor."""
    aligned = all(s * w.element_size() % 16 == 0 for s in w.stride()[:-1])
    if capability(w.device) >= (9, 0) and aligned and w.data_ptr() % 16 == 0:
        return TensorDescriptor(w, list(w.shape), list(w.stride()), block), True
    return w, False


def programs(device: torch.device, count: int) -> int:
    """Programs of a persistent kernel: one for each multiprocessor, none without work."""
    return max(1, min(count, _multiprocessors(device)))


def grid(s: SortedSlots, columns: int, tile: Tile) -> tuple[int]:
    """Programs over the tiles of sorted rows. Small tiles wait for memory: as many as there can be run side by side."""
    count = len(s.tile_expert) * columns
    device = s.order.device
    if tile.block_m < 64 and not INTERPRETED:
        return (count,)
    return (programs(device, count),)


def combine_block(tokens: int, width: int) -> tuple[int, int]:
    """Tokens and columns of one program of the combine kernel."""
    block_d = min(1024, triton.next_power_of_2(width))
    if INTERPRETED:
        return min(256, triton.next_power_of_2(tokens)), block_d
    return (1 if tokens <= 1024 else 4), block_d


def _fit(tile: Tile, element_size: int, halves: int, limit: int) -> Tile:
    """Fewer stages, then a shallower step, until the operands of all stages fit into shared memory."""
    while True:
        step = tile.block_k * (tile.block_m + halves * tile.block_n) * element_size
        # The epilogue turns the accumulator through shared memory, after the stages are done with it.
        if step * tile.num_stages <= limit - 4096:
            return tile
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        else:
            tile = replace(tile, block_k=tile.block_k // 2)


def _clamp(tile: Tile, n: int, k: int) -> Tile:
    """No larger than the matrix; tl.dot wants at least 16 of everything."""

    def within(block: int, size: int) -> int:
        return min(block, max(16, triton.next_power_of_2(size)))

    return replace(
        tile, block_n=within(tile.block_n, n), block_k=within(tile.block_k, k)
    )


def _table(rows: float, halves: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """By rows per expert; not yet fitted to a layer."""
    if INTERPRETED:
        m = 16 if rows <= 16 else 64
        up = down = dact = dx = Tile(m, 64, 64, group_m=2)
        dw = Tile(64, 64, 64, group_m=2)
    elif dtype == torch.float32:
        m = 16 if rows <= 16 else 64
        up = Tile(m, 32 if halves == 2 else 64, 32, num_warps=4, num_stages=3)
        down = dx = dact = Tile(m, 64, 32, num_warps=4, num_stages=3)
        dw = Tile(64, 64, 32, num_warps=4, num_stages=3)
    elif rows <= 16:
        up = Tile(16, 64 // halves, 64, group_m=1, num_warps=4, num_stages=6)
        down = dact = dx = Tile(16, 64, 64, group_m=1, num_warps=4, num_stages=6)
        dw = Tile(128, 128, 32, num_warps=8, num_stages=3)
    elif capability(device) < (9, 0):  # a warp holds what a warpgroup shares on sm_90
        m, warps = (64, 4) if rows < 256 else (128, 8)
        up = Tile(m, 128 // halves, 32, num_warps=warps, num_stages=4)
        down = dx = Tile(m, 128, 32, num_warps=warps, num_stages=4)
        dact = Tile(m, 64, 32, num_warps=warps, num_stages=4)
        dw = Tile(128, 128, 32, num_warps=8, num_stages=3)
    elif rows < 256:
        up = Tile(64, 256 // halves, 64, num_warps=4, num_stages=4)
        down = dx = Tile(64, 256, 64, num_warps=4, num_stages=4)
        dact = Tile(64, 128, 64, num_warps=4, num_stages=4)
        dw = Tile(128, 256, 64, num_warps=8, num_stages=3)
    else:
        up = Tile(128, 256 // halves, 64, num_stages=4)
        down = dx = Tile(128, 256, 64, num_stages=4)
        dact = Tile(128, 128, 64, num_stages=4)
        dw = Tile(128, 256, 64, num_stages=3)
    return Tiles(up, down, dact, dx, dw)


def _fitted(
    tiles: Tiles,
    width: int,
    hidden: int,
    halves: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tiles:
    """No larger than the layer's matrices and the device's shared memory."""
    limit = SHARED_MEMORY.get(capability(device), SHARED_MEMORY[8, 9])
    size = torch.empty((), dtype=dtype).element_size()

    def fitted(tile: Tile, n: int, k: int, halves: int = 1) -> Tile:
        return _fit(_clamp(tile, n, k), size, halves, limit)

    return Tiles(
        up=fitted(tiles.up, hidden, width, halves),
        down=fitted(tiles.down, width, hidden),
        dact=fitted(tiles.dact, hidden, width),
        dx=fitted(tiles.dx, width, halves * hidden),
        dw=_fit(tiles.dw, size, 1, limit),
    )


def candidates(
    slots: int,
    num_experts: int,
    width: int,
    hidden: int,
    halves: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tiles]:
    """What autotuning tries: the table's choice, with other stages and groups, and the table's other rows."""

    def changed(tiles: Tiles, stages: int = 0, group_m: int | None = None) -> Tiles:
        def change(tile: Tile) -> Tile:
            deep = max(2, tile.num_stages + stages)
            group = tile.group_m if group_m is None else group_m
            return replace(tile, num_stages=deep, group_m=group)

        return Tiles(*(change(getattr(tiles, field.name)) for field in fields(tiles)))

    rows = slots / num_experts
    first, *others = (_table(r, halves, dtype, device) for r in (rows, 16, 64, 256))
    found = [first, changed(first, stages=-1), changed(first, stages=1)]
    found += [changed(first, group_m=group) for group in (1, 4, 16)]
    found += [tiles for other in others for tiles in (other, changed(other, stages=-1))]
    layer = (width, hidden, halves, dtype, device)
    return list(dict.fromkeys(_fitted(tiles, *layer) for tiles in found))


def choose(
    slots: int,
    num_experts: int,
    width: int,
    hidden: int,
    halves: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tiles:
    """The tiles for a layer: by N/E (rows per expert), D, F and the size of an element.

    Up to 16 rows an expert the weights are read once, whatever the tile: small and many. From there on rows and weights
    are reused; from 256 rows on, what 128 rows waste in an expert's last tile is less than what they save.

    With MOE_COURSE_AUTOTUNE=1 a GPU times some alternatives on the first layer of a kind (see `autotune`).
    """
    if (
        device.type == "cuda"
        and os.environ.get("MOE_COURSE_AUTOTUNE") == "1"
        and not INTERPRETED
    ):
        from moe_course.kernels import autotune

        return autotune.choose(slots, num_experts, width, hidden, halves, dtype, device)
    rows = slots / num_experts
    tiles = _table(rows, halves, dtype, device)
    return _fitted(tiles, width, hidden, halves, dtype, device)
