"""What the compiler makes of the kernels when one constant of theirs is another: no GPU needed.

    TRITON_INTERPRET=0 python benchmarks/kernel_variants.py [--record]

For sm_90, at the sizes of a layer of Qwen3-30B-A3B with 8192 tokens: the epilogue in one piece, two and four; the sort
by blocks of 256 and of 128 slots; the weights by pointers and by tensor descriptors; and how numbers leave the
up-projection, which takes gate and up apart: through shuffles between threads, shared memory, or neither.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_course import records
from moe_course.kernels import INTERPRETED
from moe_course.kernels import compile as compiled

RECORD = Path("moe_course/data/records/kernels_variants.json")
CAPABILITY = (9, 0)


def variants() -> list[tuple[str, str, str, dict[str, Any]]]:
    """Name of a comparison, of a variant, of a kernel, and the constants that the variant changes."""
    found: list[tuple[str, str, str, dict[str, Any]]] = []
    for kernel in ("_dact_kernel", "_up_kernel"):
        for parts in (1, 2, 4):
            found.append(("epilogue", f"parts={parts}", kernel, {"PARTS": parts}))
    for block in (256, 128):
        for warps in (4, 8):
            change = {"SUB": block, "num_warps": warps}
            found.append(
                ("sort", f"{block} slots, {warps} warps", "_sort_kernel", change)
            )
    for kernel in ("_up_kernel", "_rows_kernel", "_dact_kernel"):
        found.append(("weights", "descriptors", kernel, {}))
        found.append(("weights", "pointers", kernel, {"TMA": False}))
    return found


def ways_out(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """Instructions of the up-projection that pass numbers on, in training and forward alone."""
    with compiled.compile_only(CAPABILITY, {"_up_kernel": {}}) as binaries:
        compiled.run_layer(**layer)
    rows = []
    for _, binary, options in binaries:
        text = compiled.dump(binary.asm["cubin"], "-sass")
        counts = {
            "shuffles": len(re.findall(r"\bSHFL\b", text)),
            "shared_stores": len(re.findall(r"\bSTSM?\b", text)),
            "stores_of_16_bytes": len(re.findall(r"\bSTG\.E\.128\b", text)),
        }
        variant = "training" if options["SAVE_HIDDEN"] else "forward alone"
        rows.append(
            {"comparison": "ways out", "variant": variant, "kernel": "up"} | counts
        )
        print("ways out ", variant, counts)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD}")
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("the kernels are interpreted here: set TRITON_INTERPRET=0 first")
    layer = compiled.QWEN3 | {"tokens": 8192}
    rows = []
    for comparison, variant, kernel, change in variants():
        for row in compiled.inspect(
            CAPABILITY, "bf16 swiglu T=8192", {kernel: change}, **layer
        ):
            rows.append({"comparison": comparison, "variant": variant} | asdict(row))
            print(
                f"{comparison:<9} {variant:<19} {row.kernel:<5} registers {row.registers:>3}  stack "
                f"{row.stack_bytes:>4}  spills {row.spills:>3}  copies by descriptor {row.tma_loads}, "
                f"by pointer {row.async_copies}"
            )
    rows += ways_out(layer)
    if options.record:
        command = "TRITON_INTERPRET=0 python benchmarks/kernel_variants.py --record"
        packages = ("torch", "triton")
        records.save(
            records.measure("kernels_variants", command, rows, packages), RECORD
        )


if __name__ == "__main__":
    main()
