"""What the compiler makes of the kernels, read off without a GPU.

    TRITON_INTERPRET=0 python -m moe_course.kernels.compile [--all] [--capability 9.0] [--record [PATH]]

Runs the very launches of `fused_moe`, forward and backward, on tensors without data, but stops each at the compiled
binary: registers, stack, shared memory, and how many tensor-core, copy and spill instructions it holds.

Chapter: book/kernels/fused_moe.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_course import records
from moe_course.kernels import INTERPRETED, tiles
from moe_course.kernels.fused_moe import ACTIVATIONS, backward, forward
from moe_course.kernels.grouped_gemm import GATED
from moe_course.kernels.routing import gate

RECORD = records.FOLDER / "kernels_compiled.json"


@dataclass(frozen=True)
class Compiled:
    """One binary. The stack is where registers spill to; instruction counts are of the text, not of what runs."""

    kernel: str
    capability: str
    case: str
    block: str  # BLOCK_M x BLOCK_N x BLOCK_K
    warps: int
    stages: int
    registers: int  # of 255 a thread
    stack_bytes: int
    spills: int  # loads and stores of local memory
    shared_bytes: int
    hgmma: int  # tensor-core instructions of a warpgroup (sm_90)
    hmma: int  # of a warp
    tma_loads: int  # copies by descriptor
    async_copies: int  # gathered copies that pass no register
    atomics: (
        int  # on memory; those of tl.histogram count whole numbers within a program
    )


class _CompileOnly:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton remembers the target of each device: two capabilities are two devices.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(
    capability: tuple[int, int], change: dict[str, dict[str, Any]] | None = None
) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """Every launch inside compiles for that capability and does not run; yields (name, binary, options) of each.

    change: what would come of other constants: by name of a kernel, those that replace its own. The rest is left out.
    """
    binaries: list[tuple[str, Any, dict[str, Any]]] = []
    run, capability_of, driver_before = (
        JITFunction.run,
        tiles.capability,
        driver._active,
    )

    def compile_instead(
        self: Any, *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        if change is not None:
            if self.fn.__name__ not in change:
                return
            options |= change[self.fn.__name__]
            if options.get("TMA") is False:  # a descriptor's tensor in its place
                args = tuple(getattr(value, "base", value) for value in args)
        binary = run(self, *args, grid=grid, warmup=True, **options)
        binaries.append((self.fn.__name__, binary, options))

    JITFunction.run = compile_instead
    tiles.capability = lambda device: capability
    driver.set_active(_CompileOnly(10 * capability[0] + capability[1]))
    try:
        yield binaries
    finally:
        JITFunction.run, tiles.capability = run, capability_of
        driver._active = driver_before


def run_layer(
    tokens: int,
    width: int,
    hidden: int,
    num_experts: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "swiglu",
    bias: bool = False,
    device: str = "meta",
) -> None:
    """The launches of one layer: gate, sort, forward, backward, and forward alone. On "meta" tensors hold no data."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    rows = 2 * hidden if activation in GATED else hidden
    x, w_up = empty(tokens, width), empty(num_experts, rows, width)
    w_down = empty(num_experts, width, hidden)
    ids, weights = (
        empty(tokens, k, dtype=torch.int32),
        empty(tokens, k, dtype=torch.float32),
    )
    b_up = empty(num_experts, rows) if bias else None
    b_down = empty(num_experts, width) if bias else None
    layer = (x, w_up, w_down, ids, weights, b_up, b_down, activation)
    gate(empty(tokens, num_experts, dtype=torch.float32), k, True)
    y, saved = forward(*layer, True)
    backward(y, x, w_up, w_down, weights, b_down, saved, activation, bias)
    forward(*layer, False)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(rf"\b{pattern}\b", text))


@cache
def dump(cubin: bytes, flag: str) -> str:
    """What cuobjdump says about a binary: "-sass" for its text, "-res-usage" for its registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, flag, file.name]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout


def inspect(
    capability: tuple[int, int],
    case: str,
    change: dict[str, dict[str, Any]] | None = None,
    **layer: Any,
) -> list[Compiled]:
    """Compile a layer's launches and read their binaries: one row for each different binary."""
    with compile_only(capability, change) as binaries:
        run_layer(**layer)
    rows = {}
    for name, binary, options in binaries:
        cubin = binary.asm["cubin"]
        usage = re.search(r"REG:(\d+) STACK:(\d+)", dump(cubin, "-res-usage"))
        text = dump(cubin, "-sass")
        assert usage is not None
        block = [options.get(f"BLOCK_{side}") for side in "MNK"]
        rows[binary.hash] = Compiled(
            kernel=name.strip("_").removesuffix("_kernel"),
            capability="{}.{}".format(*capability),
            case=case,
            block="x".join(str(size) for size in block if size is not None),
            warps=binary.metadata.num_warps,
            stages=binary.metadata.num_stages,
            registers=int(usage[1]),
            stack_bytes=int(usage[2]),
            spills=_count("LDL", text) + _count("STL", text),
            shared_bytes=binary.metadata.shared,
            hgmma=_count("HGMMA", text),
            hmma=_count("HMMA", text),
            tma_loads=_count("UTMALDG", text),
            async_copies=_count("LDGSTS", text),
            atomics=_count("(ATOM|ATOMG|RED)", text),
        )
    return list(rows.values())


QWEN3 = {"width": 2048, "hidden": 768, "num_experts": 128, "k": 8}
TOKENS = (
    1,
    128,
    512,
    1024,
    8192,
)  # 0.06 to 512 rows an expert: every row of the table of tiles


def shipped(thorough: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is compiled: the bf16 SwiGLU tiles, or the product with every dtype, activation and bias."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        for activation in ACTIVATIONS:
            for bias in (False, True):
                for tokens in TOKENS:
                    plain = (name, activation, bias) == ("bf16", "swiglu", False)
                    if thorough or plain:
                        case = (
                            f"{name} {activation}{' bias' if bias else ''} T={tokens}"
                        )
                        yield (
                            case,
                            {
                                "tokens": tokens,
                                "dtype": dtype,
                                "activation": activation,
                                "bias": bias,
                            }
                            | QWEN3,
                        )


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def faults(row: Compiled) -> list[str]:
    """What must not be: spills, shared memory beyond the chip's, matrix products that bypass the tensor cores."""
    capability = _capability(row.capability)
    found = []
    if row.stack_bytes or row.spills:
        found.append(f"{row.stack_bytes} bytes of stack, {row.spills} spills")
    if row.shared_bytes > tiles.SHARED_MEMORY[capability]:
        found.append(f"{row.shared_bytes} bytes of shared memory")
    if row.atomics:
        found.append(
            f"{row.atomics} atomics: the order of a sum must not be left to chance"
        )
    if row.kernel in MATRIX_KERNELS:
        block_m = int(row.block.split("x")[0])
        if capability >= (9, 0) and block_m >= 64:
            if not row.hgmma:
                found.append("no HGMMA")
        elif not row.hmma:
            found.append("no HMMA")
    return found


MATRIX_KERNELS = ("up", "rows", "dact", "weight_gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--all", action="store_true", help="every dtype, activation, bias"
    )
    parser.add_argument(
        "--capability", action="append", help="9.0, 8.0; both if none is given"
    )
    parser.add_argument(
        "--record", nargs="?", type=Path, const=RECORD, help=f"write {RECORD}, or PATH"
    )
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("the kernels are interpreted here: set TRITON_INTERPRET=0 first")
    chosen = options.capability or ["9.0", "8.0"]
    rows: list[Compiled] = []
    for capability in map(_capability, chosen):
        for case, layer in shipped(options.all):
            rows += inspect(capability, case, **layer)
    failed = False
    names = [field.name for field in fields(Compiled)]
    print(" ".join(names))
    for row in rows:
        wrong = faults(row)
        failed |= bool(wrong)
        values = " ".join(f"{getattr(row, name)!s:>7}" for name in names)
        print(values, "  FAULT: " + "; ".join(wrong) if wrong else "")
    if options.record:
        command = "TRITON_INTERPRET=0 python -m moe_course.kernels.compile --record"
        found = [asdict(row) for row in rows]
        packages = ("torch", "triton")
        records.save(
            records.measure("kernels_compiled", command, found, packages),
            options.record,
        )
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
