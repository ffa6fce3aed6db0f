"""Are the kernels right, on the GPU at hand?

    python benchmarks/kernels_correct.py [--records DIR] [--budget 150] [--dry-run]

Every check is a row: what was compared, its error, what was allowed. Exit code 1 if one failed; checks that were not
run are listed with the reason. `make gpu` runs this before it times anything.

Errors are ‖out − ref‖ / ‖ref‖ (Frobenius) against `oracle`, which computes every expert in float64. In 16 bits each
must also stay within 1.5 times that of a pipeline of torch's grouped products on the same tensors. Float32 products are
made of three tf32 ones on a GPU, so that float32 has a tolerance of its own, 1e-5, and 2e-5 for gradients.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import gpu_suite
import torch
from gpu_suite import Died, Row, Worker
from moe_peers import Layer, grouped_product, looped_product, torch_pipeline
from torch import Tensor

from moe_course.kernels import INTERPRETED, fused_moe, tiles
from moe_course.kernels import grouped_gemm as gemm
from moe_course.kernels.compile import compile_only, run_layer
from moe_course.layers.experts import ACTIVATIONS, GATED

FORWARD = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}
GRADIENT = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-5}
BESIDE = 1.5  # times the error of torch's pipeline
RUNS = 20  # that must give the same bits
NAMES = ("x", "w_up", "w_down", "weights", "b_up", "b_down")
COMMAND = "make gpu"


@dataclass(frozen=True)
class Case:
    """One layer. T tokens, D wide, E experts of width F, K a token."""

    T: int
    D: int = 256
    F: int = 192
    E: int = 8
    K: int = 2
    dtype: str = "bfloat16"
    activation: str = "swiglu"
    bias: bool = False
    routing: str = "uniform"  # see make()
    pointers: bool = False  # without tensor descriptors, as on GPUs before sm_90
    gates: str = "float32"
    apart: str = ""  # "rows" or "columns": x is not contiguous

    def __str__(self) -> str:
        words = [f"T{self.T} D{self.D} F{self.F} E{self.E} K{self.K}", self.dtype]
        words += [self.activation + (" bias" if self.bias else ""), self.routing]
        words += ["pointers"] * self.pointers
        words += [f"{self.apart} of x apart"] * bool(self.apart)
        words += [f"gates {self.gates}"] * (self.gates != "float32")
        return ", ".join(words)


QWEN3 = {"D": 2048, "F": 768, "K": 8}
DECODE = Case(T=1, E=128, **QWEN3)
DEEPSEEK = Case(T=64, D=7168, F=2048, E=256, K=8)
EVERY = [
    (a, b) for a in ("swiglu", "clamped_swiglu", "gelu", "relu") for b in (False, True)
]


def cases(dry: bool) -> list[Case]:
    """What accuracy is checked on: the important first."""
    if dry:
        small = Case(T=21, D=40, F=24, E=3, dtype="float32")
        return [
            small,
            replace(small, activation="clamped_swiglu", bias=True, pointers=True),
            replace(small, dtype="float16", activation="gelu", bias=True),
            replace(small, dtype="bfloat16", E=5, routing="idle"),
            replace(small, routing="skip", bias=True, apart="rows"),
            replace(small, T=0),
        ]
    # Rows an expert 8, 64, 512: each row of the table of tiles.
    real = [
        Case(T=1024, E=128, **QWEN3),
        Case(T=1024, E=16, **QWEN3),
        Case(T=128, E=128, **QWEN3),
    ]
    plain, large = Case(T=300), Case(T=1200)
    found = [*real, replace(plain, dtype="float32"), replace(plain, dtype="float16")]
    found += [replace(case, pointers=True) for case in (*real[:2], plain, large)]
    found += [replace(plain, activation=a, bias=b) for a, b in EVERY]
    edges = [
        replace(plain, routing=r)
        for r in ("idle", "one", "skip", "skip all", "duplicate", "zipf")
    ]
    edges += [replace(plain, T=t) for t in (0, 1, 7)]
    edges += [replace(plain, apart=a) for a in ("rows", "columns")]
    edges += [replace(plain, gates="bfloat16")]
    edges += [replace(large, routing=r, bias=True) for r in ("one", "skip")]
    ragged = [
        Case(T=127, D=100, F=200, E=5, K=3),  # rows of 200 bytes: no descriptor
        Case(T=129, D=104, F=72, E=5, K=3),
        Case(T=1000, D=264, F=136, E=7),
        Case(T=61, D=72, F=40, E=5, K=3, dtype="float32"),
    ]
    found += edges + ragged
    found += [replace(large, activation=a, bias=True) for a, _ in EVERY[::2]]
    for dtype in ("float32", "float16"):
        found += [
            replace(plain, dtype=dtype, activation=a, bias=True) for a, _ in EVERY[::2]
        ]
    found += [
        replace(plain, activation=a, bias=True, pointers=True) for a, _ in EVERY[::2]
    ]
    return [
        *found,
        replace(large, dtype="float32"),
        replace(ragged[0], dtype="float16"),
    ]


# ---- Inputs, and what is right ----------------------------------------------------------------------------------

DEVICE = "cpu" if INTERPRETED else "cuda"


def random_ids(case: Case, where: str) -> Tensor:
    """Expert ids [T, K], distinct in a row unless the routing says otherwise."""
    T, E, K = case.T, case.E, case.K
    scores = torch.rand(T, E, device=where)
    if case.routing == "zipf":  # the e-th most popular expert is wanted 1/e as often
        gumbel = -(-scores.clamp(1e-9, 1 - 1e-6).log()).log()
        scores = gumbel - torch.arange(1, E + 1, device=where).log()
    if case.routing == "idle":  # half of the experts
        scores[:, ::2] -= 2
    ids = scores.topk(K, dim=1).indices.int()
    if case.routing == "one":
        ids[:] = E - 1
    if case.routing == "duplicate":
        ids[:, 1:] = ids[:, :1]
    if case.routing.startswith("skip"):
        ids[torch.rand(T, K, device=where) < 0.3] = E
        ids[1::2] = E  # tokens without any expert
    if case.routing == "skip all":
        ids[:] = E
    return ids


def make(case: Case, seed: int, where: str = DEVICE) -> Layer:
    """A layer with fresh random numbers; its gate weights are exact in 16 bits, so that peers may round them."""
    torch.manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    rows = case.F * (2 if case.activation in GATED else 1)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=where).mul_(scale).to(dtype)

    # The clamp at 7 must bite: twice the usual size there.
    loud = 2.0 if case.activation == "clamped_swiglu" else 1.0
    x = random(case.T, case.D if not case.apart else 2 * case.D)
    if case.apart:
        x = x[:, ::2] if case.apart == "columns" else x[:, : case.D]
    return Layer(
        x=x,
        w_up=random(case.E, rows, case.D, scale=loud * case.D**-0.5),
        w_down=random(case.E, case.D, case.F, scale=case.F**-0.5),
        ids=random_ids(case, where),
        weights=torch.rand(case.T, case.K, device=where).bfloat16().to(getattr(torch, case.gates)),
        activation=case.activation,
        b_up=random(case.E, rows) if case.bias else None,
        b_down=random(case.E, case.D) if case.bias else None,
    )  # fmt: skip


def oracle(
    layer: Layer, dy: Tensor, experts: list[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """y and all gradients in float64: every expert on every token, one expert at a time.

    experts: those to compute, where the others are known to have no tokens.
    """
    count = len(layer.w_up)
    x = layer.x.detach().double()
    gates = layer.weights.detach().double()
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    dweights = torch.zeros_like(gates)
    stacks = (layer.w_up, layer.w_down, layer.b_up, layer.b_down)
    gradients = [[] for _ in stacks]
    for e in range(count) if experts is None else experts:
        leaves = [x.clone().requires_grad_()]
        leaves += [
            s[e].detach().double().requires_grad_() for s in stacks if s is not None
        ]
        tokens, w_up, w_down = leaves[:3]
        z = tokens @ w_up.T
        if layer.b_up is not None:
            z = z + leaves[3]
        out = ACTIVATIONS[layer.activation](z) @ w_down.T
        if layer.b_down is not None:
            out = out + leaves[4]
        chosen = layer.ids == e
        share = (gates * chosen).sum(1, keepdim=True)
        y += share * out.detach()
        grads = iter(torch.autograd.grad(out, leaves, share * dy.double()))
        dx += next(grads)
        for stack, found in zip(stacks, gradients, strict=True):
            if stack is not None:
                found.append(next(grads))
        dweights += (dy.double() * out.detach()).sum(1, keepdim=True) * chosen
    dw_up, dw_down, *biases = (torch.stack(found) for found in gradients if found)
    return y, [dx, dw_up, dw_down, dweights, *biases]


def ours(layer: Layer) -> Tensor:
    return fused_moe(
        layer.x, layer.w_up, layer.w_down, layer.ids, layer.weights,
        activation=layer.activation, b_up=layer.b_up, b_down=layer.b_down,
    )  # fmt: skip


def with_gradients(
    run: Callable[[Layer], Tensor], layer: Layer, dy: Tensor
) -> list[Tensor]:
    """[y, gradients...] of one run."""
    leaves = [leaf.detach().requires_grad_() for leaf in layer.leaves()]
    names = [n for n in NAMES if getattr(layer, n) is not None]
    y = run(replace(layer, **dict(zip(names, leaves, strict=True))))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(out: Tensor, ref: Tensor) -> float:
    """Relative, in the Frobenius norm; infinite where something is not finite."""
    difference, size = (out.double() - ref).norm().item(), ref.norm().item()
    if difference != difference or difference == float("inf"):
        return float("inf")
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


@contextmanager
def poisoned() -> Iterator[None]:
    """Whatever is allocated without a value is filled with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def dirty_the_allocator() -> None:
    """Leave NaN in the memory that the caching allocator will hand out next, in blocks small and large."""
    if DEVICE == "cuda":
        held = [
            torch.full((n,), float("nan"), device="cuda")
            for n in [64] * 64 + [2**16] * 32 + [2**24] * 16
        ]
        del held


@contextmanager
def without_descriptors(wanted: bool) -> Iterator[None]:
    """Plain pointers and the smaller tiles of sm_80."""
    kept = tiles.capability
    if wanted:
        tiles.capability = lambda device: (8, 0)
    try:
        yield
    finally:
        tiles.capability = kept


# ---- The checks -------------------------------------------------------------------------------------------------


def beside(case: Case, layer: Layer, dy: Tensor) -> list[Tensor] | None:
    """[y, gradients...] of torch's pipeline, or None where it cannot: skipped slots."""
    if case.routing.startswith("skip") or case.T == 0 or case.dtype == "float32":
        return None
    # torch's grouped product wants rows of a multiple of 16 bytes.
    fits = case.D % 8 == 0 and case.F % 8 == 0
    for product in [grouped_product] * fits + [looped_product]:
        try:
            run = functools.partial(torch_pipeline, product=product)
            return with_gradients(run, layer, dy)
        except (RuntimeError, TypeError, ValueError) as fault:
            print(f"torch's pipeline, {product.__name__}: {str(fault).splitlines()[0]}")
    return None


def accuracy(case: Case, seed: int) -> Row:
    """Forward with and without saving, and every gradient."""
    with poisoned():
        layer = make(case, seed)
        dy = torch.randn_like(layer.x, memory_format=torch.contiguous_format)
        with without_descriptors(case.pointers):
            found = with_gradients(ours, layer, dy)
            with torch.no_grad():
                alone = ours(layer)
        y, gradients = oracle(layer, dy)
        others = beside(case, layer, dy)
    names = ["y", *(n for n in NAMES if getattr(layer, n) is not None)]
    expected = [y, *gradients]
    errors = {n: error(o, r) for n, o, r in zip(names, found, expected, strict=True)}
    errors["y without gradients"] = error(alone, y)
    theirs = {}
    if others is not None:
        theirs = {
            n: error(o, r) for n, o, r in zip(names, others, expected, strict=True)
        }
        theirs["y without gradients"] = theirs["y"]
    wrong = []
    for name, value in errors.items():
        allowed = (FORWARD if name.startswith("y") else GRADIENT)[case.dtype]
        if value > allowed:
            wrong.append(f"{name}: {value:.1e} > {allowed:.0e}")
        # A floor of one rounding: a peer that is exact by luck sets no bar.
        elif name in theirs and value > max(BESIDE * theirs[name], allowed / 10):
            wrong.append(f"{name}: {value:.1e}, torch {theirs[name]:.1e}")
    worst = max((n for n in errors if not n.startswith("y")), key=errors.__getitem__)
    return {
        "check": "accuracy",
        "case": str(case),
        "ok": not wrong,
        "forward_error": max(errors["y"], errors["y without gradients"]),
        "forward_allowed": FORWARD[case.dtype],
        "forward_error_torch": theirs.get("y"),
        "gradient_error": errors[worst],
        "gradient_allowed": GRADIENT[case.dtype],
        "gradient_error_torch": theirs.get(worst),
        "worst_gradient": worst,
        "detail": "; ".join(wrong),
    }


def same_bits(case: Case, seed: int) -> Row:
    """So many runs on dirty memory, forward and gradients, give one result."""
    layer = make(case, seed)
    dy = torch.randn_like(layer.x)
    runs = 2 if DEVICE == "cpu" else RUNS
    different: set[str] = set()
    first = None
    for _ in range(runs):
        dirty_the_allocator()
        with torch.no_grad():
            found = [ours(layer)]
        found += with_gradients(ours, layer, dy)
        first = first or found
        names = ("y without gradients", "y", *NAMES)
        different |= {
            n
            for n, a, b in zip(names, first, found, strict=False)
            if not torch.equal(a, b)
        }
    detail = f"{runs} runs" + (
        ": differs in " + ", ".join(sorted(different)) if different else ""
    )
    return {
        "check": "same bits",
        "case": str(case),
        "ok": not different,
        "detail": detail,
    }


def graph(case: Case, gradients: bool, seed: int) -> Row:
    """Captured once, replayed on new tokens with another routing: equal to a plain run, bit for bit."""
    name = f"{case}, {'forward and backward' if gradients else 'forward'}"
    layer, other = make(case, seed), make(case, seed + 1)
    dy = torch.randn_like(layer.x)

    def run(layer: Layer) -> list[Tensor]:
        if gradients:
            return with_gradients(ours, layer, dy)
        with torch.no_grad():
            return [ours(layer)]

    if DEVICE == "cpu":
        return {"check": "graph", "case": name, "ok": None, "detail": "not run: no GPU"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(layer)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = run(layer)
    for field in ("x", "w_up", "w_down", "ids", "weights"):
        getattr(layer, field).copy_(getattr(other, field))
    captured.replay()
    torch.cuda.synchronize()
    equal = all(torch.equal(a, b) for a, b in zip(found, run(other), strict=True))
    detail = "" if equal else "the replay differs from a plain run"
    return {"check": "graph", "case": name, "ok": equal, "detail": detail}


def past_32_bits(case: Case, seed: int) -> list[Row]:
    """E·2F·D > 2^31 elements: a few tokens, on the last experts of the stack among others."""
    layer = make(case, seed)
    chosen = torch.tensor(
        [0, case.E // 2, *range(case.E - 14, case.E)], device=layer.ids.device
    )
    pick = torch.rand(case.T, len(chosen), device=layer.ids.device).topk(case.K).indices
    layer = replace(layer, ids=chosen[pick].int())
    dy = torch.randn_like(layer.x)
    small = replace(layer, x=layer.x[:2], ids=layer.ids[:2], weights=layer.weights[:2])
    rows = []
    for pointers in (False, True):
        with without_descriptors(pointers):
            y, dx, dw_up, dw_down, dweights = with_gradients(ours, layer, dy)
            with torch.no_grad():
                few = ours(small)
        used = chosen.tolist()
        ref, (rdx, rdw_up, rdw_down, rdweights) = oracle(layer, dy, used)
        errors = {
            "y": error(y, ref), "y of two tokens": error(few, ref[:2]), "x": error(dx, rdx),
            "weights": error(dweights, rdweights),
            "w_up": error(dw_up[chosen], rdw_up), "w_down": error(dw_down[chosen], rdw_down),
        }  # fmt: skip
        idle = dw_up[1 : case.E // 2].count_nonzero().item()
        bars = {
            n: (FORWARD if n.startswith("y") else GRADIENT)[case.dtype] for n in errors
        }
        wrong = [f"{n}: {v:.1e}" for n, v in errors.items() if v > bars[n]]
        wrong += [f"{idle} gradients of idle experts are not 0"] * bool(idle)
        rows.append(
            {
                "check": "past 32 bits",
                "case": str(replace(case, pointers=pointers)),
                "ok": not wrong,
                "forward_error": max(v for n, v in errors.items() if n.startswith("y")),
                "gradient_error": max(errors[n] for n in ("x", "weights", "w_up", "w_down")),
                "detail": "; ".join(wrong) or f"{case.E * 2 * case.F * case.D / 2**31:.1f} x 2^31 elements",
            }
        )  # fmt: skip
        del dw_up, dw_down
    torch.cuda.empty_cache()
    return rows


def saved_bytes(case: Case, seed: int) -> Row:
    """What the forward pass keeps for the backward pass: its allocations, or torch's hooks where there is no GPU."""
    layer = make(case, seed)
    leaves = [leaf.detach().requires_grad_() for leaf in layer.leaves()]
    grown = replace(
        layer, x=leaves[0], w_up=leaves[1], w_down=leaves[2], weights=leaves[3]
    )
    inputs = {t.untyped_storage().data_ptr() for t in leaves[1:]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ours(grown)
    found = sum(kept.values())
    if DEVICE == "cuda":  # and what the allocator says, x among it
        del y
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = ours(grown)
        grew = torch.cuda.memory_allocated() - before
        found = max(found, grew - y.nbytes + layer.x.nbytes)
    size, slots = layer.x.element_size(), case.T * case.K
    halves = 2 if case.activation in GATED else 1
    floats = size * (case.T * case.D + halves * slots * case.F)
    # Four index tensors of N or E + 1 integers; the tiles are at most N; blocks are rounded to 512 bytes.
    indices = 4 * (3 * slots + 2 * (case.E + 1)) + 8 * 512
    return {
        "check": "saved bytes",
        "case": str(case),
        "ok": found <= floats + indices,
        "saved_bytes": found,
        "allowed_bytes": floats + indices,
        "detail": f"{found / 1e6:.2f} MB; x and the pre-activation are {floats / 1e6:.2f}",
    }


SANITIZED = [
    Case(T=37, D=72, F=40, E=5),
    Case(T=37, D=72, F=40, E=5, pointers=True, bias=True),
    Case(T=2, D=72, F=40, E=16),
]


def small_runs(plant_a_fault: bool) -> None:
    """What compute-sanitizer watches: forward and backward of small layers; or a kernel that writes out of bounds."""
    if plant_a_fault:
        rows = torch.ones(4, 64, device="cuda")
        far = torch.full((4,), 2**28, device="cuda", dtype=torch.int32)
        gemm.combine(rows, far, None, 4, 1)
        torch.cuda.synchronize()
        return
    for case in SANITIZED:
        # Drawn on the CPU: the fewer kernels of others are watched, the better.
        drawn = make(case, 0, "cpu")
        given = {n: getattr(drawn, n) for n in (*NAMES, "ids")}
        layer = replace(
            drawn, **{n: t.cuda() for n, t in given.items() if t is not None}
        )
        with without_descriptors(case.pointers):
            with torch.no_grad():
                ours(layer)
            with_gradients(ours, layer, torch.randn(layer.x.shape).to(layer.x))
    torch.cuda.synchronize()


class Sanitizer:
    """compute-sanitizer over `small_runs`, beside the other checks, and over a planted fault, which it must find."""

    def __init__(self, dry: bool) -> None:
        self.why = "not run: no GPU" if dry else ""
        tool = (
            shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        )
        if not dry and not os.path.exists(tool):
            self.why = "not run: compute-sanitizer is not installed"
        self.runs: dict[str, subprocess.Popen[str]] = {}
        if self.why:
            return
        # torch keeps freed memory: without its cache every tensor has bounds of its own.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for name, words in (
            ("planted", ["--tool", "memcheck"]),
            ("memcheck", ["--tool", "memcheck"]),
            ("racecheck", ["--tool", "racecheck"]),
        ):
            flag = "--small-planted" if name == "planted" else "--small"
            self.runs[name] = subprocess.Popen(
                [tool, *words, "--print-limit", "20", "--error-exitcode", "9", sys.executable, __file__, flag],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            )  # fmt: skip

    def _summary(self, name: str, seconds: float) -> tuple[int | None, str]:
        """Errors reported, or None and why there is no report."""
        run = self.runs[name]
        try:
            output, _ = run.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            run.kill()
            return None, "not run: no end in time"
        summary = re.search(
            r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output
        )
        if summary is None:
            return None, f"not run: no report ({' '.join(output.split()[-25:])})"
        count = int(summary[1] or summary[2])
        if count and name != "planted":
            print(output[:6000])
        return count, f"{count} reported"

    def rows(self, seconds: float) -> Iterator[Row]:
        deadline = time.monotonic() + seconds
        planted, why = None, self.why
        if not self.why:
            planted, why = self._summary("planted", deadline - time.monotonic())
            if planted == 0:
                why = "not run: compute-sanitizer does not see a planted fault here"
        for tool in ("memcheck", "racecheck"):
            row: Row = {
                "check": tool,
                "case": "small layers",
                "ok": None,
                "detail": why,
            }
            if planted:
                count, row["detail"] = self._summary(tool, deadline - time.monotonic())
                row["ok"] = None if count is None else count == 0
            yield row

    def stop(self) -> None:
        for run in self.runs.values():
            run.kill()


def tasks(dry: bool, seed: int) -> dict[str, Callable[[], list[Row]]]:
    """All checks by name, the important first."""

    def one(check: Callable[..., Row], *arguments: object) -> Callable[[], list[Row]]:
        return lambda: [check(*arguments, seed)]

    everything = [
        Case(T=1024, E=128, **QWEN3),
        Case(T=1024, E=16, **QWEN3),
        Case(T=300, bias=True),
        DECODE,
    ]
    captured = [(everything[3], False), (everything[0], False), (everything[0], True)]
    if dry:
        everything = [Case(T=21, D=40, F=24, E=3, dtype="float32")]
        captured = [(everything[0], False)]
    accurate = {f"accuracy {c}": one(accuracy, c) for c in cases(dry)}
    found = dict(list(accurate.items())[:9])
    found |= {f"same bits {c}": one(same_bits, c) for c in everything}
    found |= {f"graph {c} {g}": one(graph, c, g) for c, g in captured}
    found |= {f"saved bytes {c}": one(saved_bytes, c) for c in everything[:2]}
    if not dry:
        found["past 32 bits"] = lambda: past_32_bits(DEEPSEEK, seed)
    return found | accurate


def compile_jobs() -> list[tuple[Callable[..., None], tuple[Case, tuple[int, int]]]]:
    """Each layer that is checked, once for each set of kernels that it needs."""
    wanted = [c for c in cases(False) if c.T > 1] + SANITIZED + [DEEPSEEK, DECODE]
    plain = {replace(c, routing="uniform", apart="", gates="float32") for c in wanted}
    plain.add(replace(DEEPSEEK, pointers=True))
    capability = torch.cuda.get_device_capability()
    return [(compile_case, (case, capability)) for case in sorted(plain, key=str)]


def compile_case(case: Case, capability: tuple[int, int]) -> None:
    with compile_only(capability), without_descriptors(case.pointers):
        run_layer(
            case.T, case.D, case.F, case.E, case.K,
            getattr(torch, case.dtype), case.activation, case.bias,
        )  # fmt: skip


def main() -> None:
    parser = gpu_suite.arguments(__doc__, budget=150)
    parser.add_argument("--precompile", action="store_true", help="and nothing else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="for compute-sanitizer")
    parser.add_argument("--small-planted", action="store_true", help="likewise")
    options = gpu_suite.options_of(parser)
    if options.small or options.small_planted:
        small_runs(options.small_planted)
        return
    if options.worker:
        checks = tasks(options.dry_run, options.seed)
        gpu_suite.serve(lambda name: checks[name]())
        return
    if options.precompile:
        gpu_suite.precompile(compile_jobs())
        return
    begin = time.monotonic()

    def left() -> float:
        return options.budget - (time.monotonic() - begin)

    words = [__file__, "--seed", str(options.seed)] + ["--dry-run"] * options.dry_run
    worker, sanitizer = Worker(words), Sanitizer(options.dry_run)
    rows: list[Row] = []
    for name in tasks(options.dry_run, options.seed):
        missing = {"check": name, "case": "", "ok": None}
        if left() < 25 and not options.dry_run:  # for the sanitizer, and to end in time
            rows.append(missing | {"detail": "not run: out of time"})
            continue
        try:
            rows += worker.ask(name, max(10, min(60, left())))
        except Died as death:
            rows.append(missing | {"ok": False, "detail": str(death)})
        gpu_suite.save("kernels_gpu_correct", COMMAND, rows, options.records)
    worker.stop()
    rows += sanitizer.rows(left())
    sanitizer.stop()
    gpu_suite.save("kernels_gpu_correct", COMMAND, rows, options.records)
    report(rows, time.monotonic() - begin)


def report(rows: list[Row], seconds: float) -> None:
    """The table, then every failure and what was not run."""
    words = {True: "ok", False: "FAILED", None: "not run"}
    shown = [row | {"ok": words[row["ok"]]} for row in rows]
    columns = {
        "ok": "<7",
        "check": "<12",
        "forward_error": "9.1e",
        "gradient_error": "9.1e",
        "case": "<70",
        "detail": "<40",
    }
    gpu_suite.table(shown, columns)
    for state in (None, False):
        for row in rows:
            if row["ok"] is state:
                print(
                    f"{words[state].upper()}: {row['check']} {row['case']}: {row['detail']}"
                )
    counts = {
        word: sum(row["ok"] is state for row in rows) for state, word in words.items()
    }
    print(f"correctness: {counts} in {seconds:.0f} s", flush=True)
    sys.exit(1 if counts["FAILED"] else 0)


if __name__ == "__main__":
    main()
