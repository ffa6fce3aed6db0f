"""What the compiler makes of the kernels for GPUs that are not here. The record is what this test finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is no triton for this system")

import triton

from moe_course import records
from moe_course.kernels.compile import RECORD, Compiled, faults

GOOD = Compiled(
    kernel="up", capability="9.0", case="bf16 swiglu T=8192", block="128x128x64",
    warps=8, stages=4, registers=255, stack_bytes=0, spills=0, shared_bytes=196640,
    hgmma=4, hmma=0, tma_loads=4, async_copies=16, atomics=0,
)  # fmt: skip


def compiled(tmp_path: Path, *words: str, code: str = "", **environment: str):
    """Exit code, rows and output of moe_course.kernels.compile in a process of its own; `code` runs before it."""
    path = tmp_path / "record.json"
    code += "\nfrom moe_course.kernels import compile; compile.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--record", str(path)],
        env=os.environ | {"TRITON_INTERPRET": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
    )
    print(done.stdout, done.stderr)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return done.returncode, rows, done.stdout


@pytest.mark.parametrize("capability", ["9.0", "8.0"])
def test_the_shipped_tiles_compile_without_a_fault_and_are_on_record(
    capability, tmp_path, root
):
    code, rows, _ = compiled(tmp_path, "--capability", capability)
    assert code == 0
    assert {row["kernel"] for row in rows} == {
        "gate", "count", "sort", "up", "rows", "combine", "dact", "weight_gradient",
        "decode_up", "decode_down",
    }  # fmt: skip
    record = records.load(root / RECORD)
    if record.versions["triton"] == triton.__version__:
        recorded = [row for row in record.rows if row["capability"] == capability]
        assert rows == recorded, f"run: {record.command}"


FAULTS = {
    "no fault": ({}, None),
    "stack": ({"stack_bytes": 8}, "8 bytes of stack"),
    "spills": ({"spills": 2}, "2 spills"),
    "shared memory": ({"shared_bytes": 232449}, "232449 bytes of shared memory"),
    "no tensor cores": ({"hgmma": 0}, "no HGMMA"),
    "those of a warp alone": ({"hgmma": 0, "hmma": 16}, "no HGMMA"),
    "atomics": ({"atomics": 1}, "1 atomics"),
    "sm_80 has no HGMMA": ({"capability": "8.0", "hgmma": 0, "hmma": 32, "shared_bytes": 0}, None),
    "sm_80 without HMMA": ({"capability": "8.0", "hgmma": 0, "shared_bytes": 0}, "no HMMA"),
    "small tiles need HMMA": ({"block": "16x32x64", "hgmma": 0, "hmma": 8}, None),
    "small tiles without": ({"block": "16x32x64", "hgmma": 0}, "no HMMA"),
    "the sort needs none": ({"kernel": "sort", "hgmma": 0}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case):
    change, message = FAULTS[case]
    found = faults(replace(GOOD, **change))
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_a_tile_that_is_too_large_is_found(tmp_path):
    code = """
import sys
from dataclasses import replace
from moe_course.kernels import compile, tiles, fused_moe
compile.TOKENS = (8192,)
layer, real = sys.modules[fused_moe.__module__], tiles.choose
def choose(*args):
    t = real(*args)
    return replace(t, dact=replace(t.dact, block_n=256, num_warps=4))
layer.choose = choose
"""
    status, rows, out = compiled(tmp_path, "--capability", "9.0", code=code)
    assert status == 1
    spilled = {row["kernel"] for row in rows if row["spills"]}
    assert spilled == {"dact"}
    assert "FAULT" in out


def test_a_kernel_with_other_constants_alone():
    code = """
from moe_course.kernels.compile import QWEN3, inspect
layer = QWEN3 | {"tokens": 8192}
(one,) = inspect((9, 0), "", {"_dact_kernel": {"PARTS": 1}}, **layer)
(four,) = inspect((9, 0), "", {"_dact_kernel": {"TMA": False}}, **layer)
print(one.kernel, one.stack_bytes > 0, one.tma_loads > 0)
print(four.kernel, four.stack_bytes > 0, four.tma_loads > 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout.split("\n")[:2] == ["dact True True", "dact False False"], (
        done.stderr
    )


def test_sizes_of_one_compile():
    """Triton makes an argument that is 1 a constant of the compiler, which has no methods; the interpreter does not."""
    code = """
from moe_course.kernels.compile import inspect
one = {"tokens": 1, "width": 1, "hidden": 1, "num_experts": 1, "k": 1, "bias": True}
print({row.kernel for row in inspect((9, 0), "", **one)} >= {"up", "dact", "decode_up"})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout == "True\n", done.stderr


def test_it_says_what_to_set_in_a_process_of_the_interpreter(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moe_course.kernels.compile"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "set TRITON_INTERPRET=0 first" in done.stderr


@pytest.mark.thorough
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", ["9.0", "8.0"])
def test_every_dtype_activation_and_bias(capability, tmp_path):
    code, rows, _ = compiled(tmp_path, "--all", "--capability", capability)
    assert code == 0
    assert len({row["case"] for row in rows}) == 3 * 4 * 2 * 5


@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_the_triton_of_torch_2_11(tmp_path):
    folder = tmp_path / "triton"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "triton==3.6.0"],
        check=True,
        timeout=600,
    )  # fmt: skip
    environment = {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    }
    check = "import triton; assert triton.__version__ == '3.6.0'"
    for capability in ("9.0", "8.0"):
        status, rows, _ = compiled(
            tmp_path, "--capability", capability, code=check, **environment
        )
        assert status == 0
        assert rows


def test_the_record_holds_every_field(root):
    for row in records.load(root / RECORD).rows:
        assert set(row) == set(asdict(GOOD))
