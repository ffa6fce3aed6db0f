"""The whole MoE layer on a GPU, from (x, expert ids, gate weights) to y, beside its peers: time, rate, floor, memory.

    python benchmarks/moe_kernels.py [--records DIR] [--budget 300] [--only PATTERN] [--dry-run]
    python benchmarks/moe_kernels.py --tune qwen3-30b-a3b:8192 [...]

A row is one layer, one number of tokens, one routing, one pass and one contender. Contenders take turns within each
round, each from a cold L2 cache, and a row is the median over rounds; a ratio is the median over rounds of two times of
the same round. Up to 128 tokens the layer is captured in a CUDA graph that runs several copies of the weights in turn,
so that they come from memory. Every peer must first give our output.

The important rows come first, and what the budget does not reach is listed. `--tune` times tiles, stage by stage.

The floor of a row is max(FLOPs / matmul rate, bytes / copy rate), with both ceilings measured at the start. In
elements, for N = T·K rows, H = 1 or 2 matrices in the up-projection (2 if gated) and the experts that a token chose,

    forward           distinct·(H+1)·D·F  +  x: T·D  +  act, written and read: 2·N·F  +  its product: 2·N·D  +  y: T·D
    forward+backward  twice the weights, their gradients E·(H+1)·D·F, and for the activations three times the above
                      and the pre-activation, its gradient and the weighted act: 8·N·H·F

and in FLOPs 2·(H+1)·N·D·F forward, three times that with the backward pass: 6 and 18·N·D·F for SwiGLU.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import gpu_suite
import moe_peers
import torch
from gpu_suite import Died, Row, Worker
from kernels_correct import Case, error, make, ours
from moe_peers import Layer, Unavailable
from torch import Tensor

from moe_course.kernels import INTERPRETED, sort_by_expert
from moe_course.kernels import grouped_gemm as gemm
from moe_course.kernels.compile import compile_only
from moe_course.kernels.fused_moe import backward, forward
from moe_course.kernels.tiles import SHARED_MEMORY, Tile, Tiles, choose
from moe_course.layers.experts import GATED
from moe_course.specs import RoutedExperts, zoo

COMMAND = "make gpu"
DEVICE = "cpu" if INTERPRETED else "cuda"
LOOSE = 2e-2  # how far a peer's output may be from ours, in 16 bits
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache
SECONDS = 1.0  # of timing, a task
DECODE = 128  # tokens, up to which a layer runs in a CUDA graph
MODELS = {
    "mixtral": "mixtral-8x7b",
    "qwen3": "qwen3-30b-a3b",
    "olmoe": "olmoe-1b-7b",
    "gpt-oss": "gpt-oss-20b",
    "deepseek": "deepseek-v3",
}
# T, D, F, E, K of the figure 14 of SonicMoE (arXiv:2512.14080): three expert widths at each of three sizes.
SONIC = {
    f"sonic-{size}-n{F}": (T, D, F, E, K)
    for size, T, D, grid in (
        ("7b", 24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        ("30b", 32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
        ("120b", 32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
    )
    for F, E, K in grid
}
# Tuning these on every shape would take more than the budget.
LEFT_OUT = dict.fromkeys(
    ("liger", "scattermoe"), "left out here, to save the budget its tuning"
)
AFTER_A_DEATH = dict.fromkeys(
    ("liger", "scattermoe", "triton_kernels"),
    "left out: this row died with it among the peers",
)


@dataclass(frozen=True)
class Task:
    """What becomes one row for each contender."""

    model: str
    T: int
    passes: str = "forward"  # or "forward+backward"
    routing: str = "uniform"

    def __str__(self) -> str:
        return f"{self.model} {self.T} {self.passes} {self.routing}"

    def case(self) -> Case:
        dtype = "float32" if INTERPRETED else "bfloat16"
        common: dict[str, Any] = {
            "T": self.T,
            "routing": self.routing,
            "dtype": dtype,
            "gates": dtype,
        }
        if self.model == "tiny":
            return Case(D=32, F=24, E=4, K=2, **common)
        if self.model in SONIC:
            _, D, F, E, K = SONIC[self.model]
            return Case(D=D, F=F, E=E, K=K, **common)
        spec = zoo[MODELS[self.model]]
        assert isinstance(spec.moe, RoutedExperts)
        return Case(
            D=spec.width,
            F=spec.moe.expert.hidden,
            E=spec.moe.experts,
            K=spec.moe.k,
            activation="clamped_swiglu" if self.model == "gpt-oss" else "swiglu",
            bias=spec.moe.expert.bias,
            **common,
        )


def plan(dry: bool) -> list[Task]:
    """All rows, the important first."""
    if dry:
        return [Task("tiny", 24), Task("tiny", 8, "forward+backward", "zipf")]
    both = ("forward", "forward+backward")
    tasks = [Task("qwen3", T, passes) for passes in both for T in (8192, 32768)]
    main = [("olmoe", 8192), ("gpt-oss", 4096), ("mixtral", 4096), ("mixtral", 8192)]
    tasks += [Task(model, T) for model, T in main]
    tasks += [Task("qwen3", T) for T in (1, 128, 8, 32)]
    tasks += [Task(model, T, both[1]) for model, T in main[:3]]
    tasks += [Task("qwen3", T, routing="zipf") for T in (8192, 32768, 128)]
    tasks += [Task(model, SONIC[model][0]) for model in list(SONIC)[::-1]]
    decode = ("mixtral", "olmoe", "gpt-oss", "deepseek")
    tasks += [Task(model, T) for model in decode for T in (1, 32, 128, 8)]
    tasks += [Task(model, T, routing="zipf") for model, T in main]
    tasks += [Task(model, SONIC[model][0], both[1]) for model in list(SONIC)[::-1]]
    tasks += [Task("qwen3", 8192, both[1], "zipf"), Task("deepseek", 8192)]
    tasks += [Task("qwen3", T, passes) for T in (4096, 1024) for passes in both]
    rest = ("olmoe", "gpt-oss", "mixtral")
    tasks += [Task(m, T) for m in rest for T in (32768, 1024, 8192, 4096)]
    tasks += [Task(m, T, both[1]) for m in rest for T in (32768, 8192, 1024)]
    return list(dict.fromkeys(tasks))


# ---- Counting and timing ----------------------------------------------------------------------------------------


def halves(case: Case) -> int:
    return 2 if case.activation in GATED else 1


def flops(case: Case, passes: str) -> int:
    product = 2 * case.T * case.K * case.D * case.F
    return product * (halves(case) + 1) * (3 if "backward" in passes else 1)


def bytes_moved(case: Case, passes: str, distinct: float) -> float:
    """The formula of the module's docstring."""
    H, N = halves(case), case.T * case.K
    expert = (H + 1) * case.D * case.F
    activations = 2 * case.T * case.D + 2 * N * case.F + 2 * N * case.D
    elements = distinct * expert + activations
    if "backward" in passes:
        elements = 2 * distinct * expert + case.E * expert
        elements += 3 * activations + 8 * N * H * case.F
    return elements * (4 if case.dtype == "float32" else 2)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def rounds(
    calls: dict[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Microseconds of every call in every round, each from a cold cache."""
    flush = torch.empty(
        FLUSH_BYTES if DEVICE == "cuda" else 1, dtype=torch.int8, device=DEVICE
    )

    def once(call: Callable[[], object]) -> float:
        if DEVICE == "cpu":
            begin = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        # Half a millisecond's start for the host: a call's launches queue up, unless it waits for the GPU.
        torch.cuda._sleep(1_000_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)

    for call in calls.values():  # compile, tune, warm up
        call()
        once(call)
    total = sum(once(call) for call in calls.values()) / 1e6
    count = 2 if DEVICE == "cpu" else max(7, min(50, int(seconds / max(total, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(count):
        names.append(names.pop(0))
        for name in names:
            times[name].append(once(calls[name]))
    return times


def ceilings() -> Row:
    """The rates that floors are reckoned with: a large bf16 product of random numbers, and a large copy."""
    size, copied = (8192, 4 * 2**30) if DEVICE == "cuda" else (256, 2**20)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    source = torch.randint(-128, 127, (copied,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    times = rounds(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, SECONDS
    )
    product, copy = (statistics.median(t) for t in times.values())
    return {
        "what": "ceilings",
        "matmul_tflops": 2 * size**3 / product / 1e6,
        "copy_tb_per_s": 2 * copied / copy / 1e6,
    }


def captured(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """A CUDA graph of all of them, one after another."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls + calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


# ---- One row for each contender ---------------------------------------------------------------------------------


def step(run: Callable[[Layer], Tensor], layer: Layer, dy: Tensor | None) -> Any:
    """One forward pass, or one with all gradients if there is a dy."""
    if dy is None:
        with torch.no_grad():
            return run(layer)
    return torch.autograd.grad(run(layer), layer.leaves(), dy)


def peak_mib(call: Callable[[], object]) -> float | None:
    """The most memory alive at once beyond the layer itself."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def layers_of(task: Task) -> list[Layer]:
    """The layer; for decoding, copies with tokens of their own, read in turn."""
    case = task.case()
    layer = make(case, seed=0)
    if task.T > DECODE or DEVICE == "cpu":
        return [layer]
    weights = sum(w.nbytes for w in layer.leaves()[1:3])
    count = 4 if 4 * weights < 50e9 else 2
    found = [layer]
    for seed in range(1, count):
        fresh = make(replace(case, F=1), seed)  # for its tokens
        copies = {n: getattr(layer, n).clone() for n in ("w_up", "w_down")}
        tokens = {n: getattr(fresh, n) for n in ("x", "ids", "weights")}
        found.append(replace(layer, **tokens, **copies))
    return found


def contenders(layers: list[Layer], without: dict[str, str]) -> dict[str, Any]:
    """Name -> one callable for each layer, or the reason why there is none."""
    found: dict[str, Any] = {"ours": [ours] * len(layers)}
    for name, get in moe_peers.PEERS.items():
        if name in without:
            found[name] = without[name]
            continue
        try:
            found[name] = [get(layer) for layer in layers]
        except Unavailable as reason:
            found[name] = str(reason)
    return found


def measure(task: Task, without: dict[str, str]) -> Iterator[Row]:
    """The rows of a task: our kernels, then each peer, or why it has no time."""
    layers = layers_of(task)
    yield from _measure(task, task.case(), layers, without)
    if layers[0].activation != "swiglu":
        # Some peers know plain SwiGLU alone: on the same sizes, and all the others likewise.
        plain = [moe_peers.plain(layer) for layer in layers]
        case = replace(task.case(), activation="swiglu", bias=False)
        yield from _measure(task, case, plain, without, " plain SwiGLU")


def _measure(
    task: Task, case: Case, layers: list[Layer], without: dict[str, str], kind: str = ""
) -> Iterator[Row]:
    graphs = task.T <= DECODE and DEVICE == "cuda"
    dy = None
    if "backward" in task.passes:
        dy = torch.randn_like(layers[0].x)
        for leaf in layers[0].leaves():
            leaf.requires_grad_()
    distinct = statistics.mean(len(layer.ids.unique()) for layer in layers)
    common = {
        "what": "layer", "model": task.model, "T": case.T, "D": case.D, "F": case.F, "E": case.E,
        "K": case.K, "dtype": case.dtype, "activation": case.activation, "bias": case.bias,
        "routing": case.routing, "passes": task.passes, "flops": flops(case, task.passes),
        "bytes": bytes_moved(case, task.passes, distinct),
    }  # fmt: skip
    calls: dict[str, Callable[[], object]] = {}
    share: dict[str, int] = {}
    notes: dict[str, Row] = {}
    reference = step(ours, layers[0], None).double()
    for name, runs in contenders(layers, without).items():
        if isinstance(runs, str):
            notes[name] = {"note": runs}
            continue
        try:
            off = error(step(runs[0], layers[0], None), reference)
            if not off <= LOOSE:
                notes[name] = {"note": f"its output differs from ours by {off:.1e}"}
                continue
            each = [
                _call(run, layer, dy) for run, layer in zip(runs, layers, strict=True)
            ]
            in_turn = itertools.cycle(each)
            eager = lambda turn=in_turn: next(turn)()  # noqa: E731
            eager()
            notes[name] = {"mode": "eager", "peak_mib": peak_mib(eager)}
            calls[name], share[name] = eager, 1
            if graphs and name not in moe_peers.SYNCHRONISES:
                if name == "ours":
                    calls["ours eager"], share["ours eager"] = eager, 1
                    notes["ours eager"] = notes[name] | {}
                calls[name], share[name] = captured(each), len(each)
                notes[name]["mode"] = "graph"
        except (RuntimeError, ValueError) as fault:
            # Out of memory, a size that it refuses, a capture that failed: then its plain time, if it has one.
            notes.setdefault(name, {})["note"] = str(fault).split("\n")[0][:160]
            if "CUDA error" in str(fault) and "captur" not in str(fault):
                raise
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
    times = rounds(calls, SECONDS)
    times = {n: [t / share[n] for t in values] for n, values in times.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    peers = [name for name in times if not name.startswith("ours")]
    best = min(peers, key=median.__getitem__) if peers else None
    for name, note in notes.items():
        row = common | {"contender": name + kind, "mode": None, "time_us": None} | note
        if name in times:
            row |= {"time_us": median[name], "rounds": len(times[name])}
            if best is not None:
                row["best_peer"] = best
                pairs = zip(times[name], times[best], strict=True)
                row["ratio_to_best_peer"] = statistics.median(a / b for a, b in pairs)
        yield row


def _call(
    run: Callable[[Layer], Tensor], layer: Layer, dy: Tensor | None
) -> Callable[[], object]:
    return lambda: step(run, layer, dy)


# ---- Stages, and the tiles that suit them -----------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One launch of the layer; a tile other than the table's may be given."""

    name: str
    run: Callable[[Any], object]
    flops: float
    elements: float  # read and written
    field: str = ""  # of Tiles


def stages(case: Case, layer: Layer, chosen: Tiles) -> list[Stage]:
    """The launches of a layer, forward and backward, each on what the one before gave."""
    T, K, D, F, E, H = case.T, case.K, case.D, case.F, case.E, halves(case)
    N, kind = T * K, layer.activation
    dy = torch.randn_like(layer.x)
    sorts = {
        m: sort_by_expert(layer.ids, E, m) for m in {16, 64, 128, chosen.up.block_m}
    }
    s = sorts[chosen.up.block_m]

    def up(t: Tile, save: bool) -> tuple[Tensor, Tensor]:
        inputs = (layer.x, layer.w_up, layer.b_up, sorts[t.block_m], K)
        return gemm.up_projection(*inputs, kind, save, t)

    act, hidden = up(chosen.up, True)

    def down(t: Tile) -> Tensor:
        return gemm.row_products(
            act, layer.w_down, layer.b_down, sorts[t.block_m], True, t
        )

    def d_act(t: Tile) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (dy, layer.w_down, layer.b_down, hidden, layer.weights)
        return gemm.activation_gradient(*inputs, sorts[t.block_m], kind, t)

    rows = down(chosen.down)
    dhidden, scaled, _ = d_act(chosen.dact)

    def d_rows(t: Tile) -> Tensor:
        return gemm.row_products(dhidden, layer.w_up, None, sorts[t.block_m], False, t)

    product, w = 2.0 * N * D * F, E * D * F
    return [
        Stage(
            "sort", lambda _: sort_by_expert(layer.ids, E, chosen.up.block_m), 0, 3 * N
        ),
        Stage("up", lambda t: up(t, False), H * product, H * w + T * D + N * F, "up"),
        Stage(
            "up, saving",
            lambda t: up(t, True),
            H * product,
            H * w + T * D + N * F * (1 + H),
            "up",
        ),
        Stage("down", down, product, w + N * (D + F), "down"),
        Stage(
            "combine",
            lambda _: gemm.combine(rows, s.inverse, layer.weights, T, K),
            0,
            N * D + T * D,
        ),
        Stage("d act", d_act, product, w + T * D + N * F * (2 * H + 1), "dact"),
        Stage(
            "d W_down",
            lambda t: gemm.weight_gradient(dy, scaled, s, K, t, gather_p=True),
            product,
            w + T * D + N * F,
            "dw",
        ),
        Stage(
            "d W_up",
            lambda t: gemm.weight_gradient(dhidden, layer.x, s, K, t, gather_q=True),
            H * product,
            H * w + T * D + N * H * F,
            "dw",
        ),
        Stage("d rows", d_rows, H * product, H * w + N * (H * F + D), "dx"),
        Stage(
            "d x", lambda _: gemm.combine(rows, s.inverse, None, T, K), 0, N * D + T * D
        ),
    ]


def table_for(case: Case, device: torch.device) -> Tiles:
    dtype = getattr(torch, case.dtype)
    slots = case.T * case.K
    return choose(slots, case.E, case.D, case.F, halves(case), dtype, device)


def time_stages(task: Task) -> Iterator[Row]:
    """Where the time of a layer goes: a row for each stage, with the table's tiles."""
    case = task.case()
    layer = make(case, seed=0)
    chosen = table_for(case, layer.x.device)
    found = stages(case, layer, chosen)
    tiles = {s.name: getattr(chosen, s.field) if s.field else None for s in found}
    calls = {s.name: (lambda s=s: s.run(tiles[s.name])) for s in found}
    times = rounds(calls, SECONDS)
    for stage in found:
        yield {
            "what": "stage", "model": task.model, "T": case.T, "routing": case.routing,
            "stage": stage.name, "tile": _words(tiles[stage.name]),
            "time_us": statistics.median(times[stage.name]),
            "flops": stage.flops, "bytes": stage.elements * (4 if case.dtype == "float32" else 2),
        }  # fmt: skip


def _words(tile: Tile | None) -> str:
    if tile is None:
        return ""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} g{tile.group_m} w{tile.num_warps} s{tile.num_stages}"


def candidates(stage: Stage, given: Tile, case: Case) -> list[Tile]:
    """Tiles around the table's that fit into shared memory; the table's first."""
    weights = stage.field == "dw"
    wide = halves(case) if stage.field == "up" else 1
    size = 4 if case.dtype == "float32" else 2
    rows_m = (64, 128) if weights or given.block_m > 16 else (16,)
    found = {given: None}
    for m, n, k, warps, deep in itertools.product(
        rows_m, (32, 64, 128, 256), (32, 64, 128), (4, 8), (3, 4)
    ):
        columns = n * wide
        step_bytes = k * (m + columns) * size
        # An accumulator of more than 128 registers a thread spills; a small one waits for its loads.
        registers = m * columns / (32 * warps)
        fits = deep * step_bytes <= SHARED_MEMORY[9, 0] - 4096
        if fits and 32 * given.block_m // 64 <= registers <= 128:
            found[
                replace(
                    given,
                    block_m=m,
                    block_n=n,
                    block_k=k,
                    num_warps=warps,
                    num_stages=deep,
                )
            ] = None
    return list(found)


def tune(wanted: list[str], budget: float) -> None:
    """Print the best tiles of every stage. The row kernels share block_m: the best is named for each."""
    begin = time.monotonic()
    for word in wanted:
        model, _, tokens = word.partition(":")
        task = Task(model, int(tokens or 8192))
        case = task.case()
        layer = make(case, seed=0)
        chosen = table_for(case, layer.x.device)
        todo = [s for s in stages(case, layer, chosen) if s.field]
        lists = {s.name: candidates(s, getattr(chosen, s.field), case) for s in todo}
        if not INTERPRETED:
            capability = torch.cuda.get_device_capability()
            jobs = [
                (compile_stage, (case, s.name, t, capability))
                for s in todo
                for t in lists[s.name]
            ]
            gpu_suite.precompile(jobs)
        for stage in todo:
            results = []
            for tile in lists[stage.name][: 3 if INTERPRETED else None]:
                if time.monotonic() - begin > budget:
                    break
                try:
                    times = rounds({"": lambda t=tile, s=stage: s.run(t)}, 0.02)
                except Exception as fault:
                    print(f"{_words(tile)}: {str(fault).splitlines()[0][:80]}")
                    continue
                results.append((statistics.median(times[""]), tile))
            print(
                f"\n{model} T={case.T}, {stage.name}: {len(results)} of {len(lists[stage.name])} tiles timed"
            )
            ours_now = next(
                (t for t, tile in results if tile == lists[stage.name][0]), math.nan
            )
            print(f"  table {_words(lists[stage.name][0]):28} {ours_now:9.1f} us")
            for taken, tile in sorted(results, key=lambda pair: pair[0])[:8]:
                rate = stage.flops / taken / 1e6
                print(
                    f"        {_words(tile):28} {taken:9.1f} us {rate:6.0f} TFLOP/s",
                    flush=True,
                )


# ---- Compiled ahead ---------------------------------------------------------------------------------------------


def _empty(case: Case) -> Layer:
    """A layer without data."""
    dtype = getattr(torch, case.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = halves(case) * case.F
    return Layer(
        empty(case.T, case.D), empty(case.E, rows, case.D), empty(case.E, case.D, case.F),
        torch.empty(case.T, case.K, dtype=torch.int32, device="meta"), empty(case.T, case.K),
        case.activation,
        empty(case.E, rows) if case.bias else None, empty(case.E, case.D) if case.bias else None,
    )  # fmt: skip


def compile_layer(case: Case, passes: str, capability: tuple[int, int]) -> None:
    """The launches of a task."""
    layer, save = _empty(case), "backward" in passes
    with compile_only(capability):
        y, saved = forward(
            layer.x, layer.w_up, layer.w_down, layer.ids, layer.weights,
            layer.b_up, layer.b_down, layer.activation, save,
        )  # fmt: skip
        if save:
            backward(
                y, layer.x, layer.w_up, layer.w_down, layer.weights, layer.b_down,
                saved, layer.activation, case.bias,
            )  # fmt: skip


def compile_stage(
    case: Case, name: str, tile: Tile, capability: tuple[int, int]
) -> None:
    """One stage with one tile."""
    with compile_only(capability):
        layer = _empty(case)
        chosen = table_for(case, layer.x.device)
        next(s for s in stages(case, layer, chosen) if s.name == name).run(tile)


def compile_liger(
    case: Case, passes: str, part: int, parts: int, capability: tuple[int, int]
) -> None:
    """One of several parts of what liger's autotuner will try: every parts-th of its configurations."""
    from liger_kernel.ops import fused_moe as liger
    from triton.runtime.autotuner import Autotuner

    layer = _empty(case)
    run = moe_peers.liger(layer)
    tuned, routing = Autotuner.run, liger.compute_routing_metadata

    def every(self: Any, *args: Any, **options: Any) -> None:
        for number, config in enumerate(self.configs):
            if number % parts == part:
                with suppress(Exception):  # one that does not compile loses later
                    self.fn.run(*args, **options, **config.all_kwargs())

    def routed(ids: Tensor, E: int, *_: Any) -> tuple[Tensor, ...]:
        sizes = (E, E + 1, *[ids.numel()] * 3, E, E)
        return tuple(ids.new_empty(size) for size in sizes)

    Autotuner.run, liger.compute_routing_metadata = every, routed
    try:
        with compile_only(capability):
            dy = None
            if "backward" in passes:
                dy = torch.empty_like(layer.x)
                for leaf in layer.leaves():
                    leaf.requires_grad_()
            step(run, layer, dy)
    finally:
        Autotuner.run, liger.compute_routing_metadata = tuned, routing


def compile_jobs(
    tasks: list[Task],
) -> list[tuple[Callable[..., None], tuple[Any, ...]]]:
    """What the tasks will launch, in their order; then what liger will try."""
    capability = torch.cuda.get_device_capability()
    found: dict[Any, None] = {}
    shapes: dict[Case, str] = {}
    for task in tasks:
        case = replace(task.case(), routing="uniform")
        found[compile_layer, (case, task.passes, capability)] = None
        if case.activation != "swiglu":
            case = replace(case, activation="swiglu", bias=False)
            found[compile_layer, (case, task.passes, capability)] = None
        if not without(task):
            shape = replace(case, T=4096)
            if shapes.get(shape, "forward") == "forward":
                shapes[shape] = task.passes
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return list(found)
    parts = 8
    for case, passes in shapes.items():
        for part in range(parts):
            found[compile_liger, (case, passes, part, parts, capability)] = None
    return list(found)


def without(task: Task) -> dict[str, str]:
    """Peers that sit a task out, and why."""
    return LEFT_OUT if task.model in SONIC or task.model == "deepseek" else {}


# ---- The program ------------------------------------------------------------------------------------------------


def derived(row: Row, rates: Row | None) -> Row:
    """With rate, floor and the fraction of it that was achieved."""
    row = dict(row)
    if row.get("time_us") and "flops" in row:
        row["tflops"] = row["flops"] / row["time_us"] / 1e6
    if rates is not None and "bytes" in row:
        row["floor_us"] = max(
            row["flops"] / rates["matmul_tflops"], row["bytes"] / rates["copy_tb_per_s"]
        ) / 1e6  # fmt: skip
        if row.get("time_us"):
            row["fraction_of_floor"] = row["floor_us"] / row["time_us"]
    return row


def report(rows: list[Row], left_out: list[str], seconds: float) -> None:
    """One line a task, the stages, who did not take part, what was not run."""
    for row in rows:
        if row["what"] == "ceilings":
            print(
                f"\nceilings: {row['matmul_tflops']:.0f} TFLOP/s (bf16 product), {row['copy_tb_per_s']:.2f} TB/s (copy)"
            )
    stages_found = [row for row in rows if row["what"] == "stage"]
    if stages_found:
        gpu_suite.table(
            stages_found,
            {
                "stage": "<11",
                "tile": "<22",
                "time_us": "9.1f",
                "tflops": "6.0f",
                "floor_us": "9.1f",
                "fraction_of_floor": "8.2f",
            },
        )
        print()
    mine = [
        r for r in rows if r["what"] == "layer" and r["contender"].startswith("ours")
    ]
    short = {"forward": "fwd", "forward+backward": "fwd+bwd"}
    lines = []
    for row in mine:
        lines.append(
            {
                "model": row["model"] + (" (plain)" if "plain" in row["contender"] else ""),
                "tokens": row["T"], "route": row["routing"],
                "pass": short[row["passes"]] + (" eager" if "eager" in row["contender"] else ""),
                "us": row["time_us"], "TF/s": row.get("tflops"), "floor us": row.get("floor_us"),
                "of floor": row.get("fraction_of_floor"), "vs best": row.get("ratio_to_best_peer"),
                "best peer": row.get("best_peer"), "MiB": row.get("peak_mib"),
            }
        )  # fmt: skip
    gpu_suite.table(
        lines,
        {
            "model": "<15",
            "tokens": "6d",
            "route": "<7",
            "pass": "<13",
            "us": "9.1f",
            "TF/s": "5.0f",
            "floor us": "9.1f",
            "of floor": "8.2f",
            "vs best": "7.2f",
            "best peer": "<16",
            "MiB": "7.0f",
        },
    )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["what"] == "layer" and row["time_us"] is None:
            key = f"{row['contender']}: {row['note']}"
            reasons.setdefault(key, []).append(f"{row['model']} {row['T']}")
    for reason, where in reasons.items():
        print(f"no time for {reason} ({len(where)} rows, as {where[0]})")
    for name in left_out:
        print("NOT RUN:", name)
    print(f"benchmark: {len(rows)} rows in {seconds:.0f} s", flush=True)


def main() -> None:
    parser = gpu_suite.arguments(__doc__, budget=300)
    parser.add_argument("--only", default="", help="tasks whose name this matches")
    parser.add_argument("--precompile", action="store_true", help="and nothing else")
    parser.add_argument("--tune", nargs="+", metavar="MODEL:TOKENS", help="time tiles")
    options = gpu_suite.options_of(parser)
    tasks = {str(task): task for task in plan(options.dry_run)}
    staged = Task("tiny", 24) if options.dry_run else Task("qwen3", 8192)

    def do(name: str) -> Iterator[Row]:
        name, _, again = name.partition(" again")
        if name == "ceilings":
            yield ceilings()
        elif name == "stages":
            yield from time_stages(staged)
        else:
            # After a death: with torch's own peers alone.
            absent = AFTER_A_DEATH if again else without(tasks[name])
            yield from measure(tasks[name], absent)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    if options.worker:
        gpu_suite.serve(do)
        return
    names = ["ceilings", *tasks]
    names.insert(min(9, len(names)), "stages")
    names = [n for n in names if n == "ceilings" or re.search(options.only, n)]
    if options.precompile:
        gpu_suite.precompile(compile_jobs([tasks[n] for n in names if n in tasks]))
        return
    if options.tune:
        tune(options.tune, options.budget)
        return
    begin = time.monotonic()

    def left() -> float:
        return options.budget - (time.monotonic() - begin)

    worker = Worker([__file__] + ["--dry-run"] * options.dry_run)
    rows: list[Row] = []
    rates = None
    missing = []
    for name in names:
        if left() < 8 and not options.dry_run:
            missing.append(f"{name}: out of time")
            continue
        for attempt in (name, f"{name} again"):
            try:
                for row in worker.ask(attempt, max(20, min(90, left()))):
                    rates = row if row["what"] == "ceilings" else rates
                    rows.append(derived(row, rates))
                break
            except Died as death:
                print(f"{attempt}: {death}", flush=True)
                if attempt != name or left() < 30:
                    missing.append(f"{name}: {death}")
                    break
        gpu_suite.save("kernels_gpu", COMMAND, rows, options.records)
    worker.stop()
    report(rows, missing, time.monotonic() - begin)


if __name__ == "__main__":
    main()
