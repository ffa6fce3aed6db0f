"""The MoE layer against the MoE block of `transformers`, on one CPU thread: time and memory.

    python benchmarks/dispatch.py [--rounds 9] [--processes 5] [--record]

Whole layers from the same weights and inputs, router included. Contenders take turns within each round, and a ratio is
the median over rounds of two times of the same round, so that a machine that slows down for a while slows down all.
Where the allocator puts large results differs from process to process and can cost a tenth, so each row is the median
over several processes. Times are CPU times of the one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from moe_course import records
from moe_course.layers import Experts, MoE, TopKRouter

# T, D, F, E, K: few wide experts, as in Mixtral, and many narrow ones, as in OLMoE and Qwen3.
SHAPES = [(512, 512, 1024, 8, 2), (2048, 256, 128, 64, 8)]
DTYPES = [torch.float32, torch.bfloat16]
PASSES = ["forward", "forward+backward"]
OURS, PEERS = ["loop", "grouped"], ["transformers eager", "transformers grouped_mm"]
RECORD = Path("moe_course/data/records/dispatch_cpu.json")


def peer_block(shape: tuple[int, ...], implementation: str) -> nn.Module:
    """The MoE block of Mixtral, with random weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    _, width, hidden, experts, k = shape
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_local_experts=experts,
        num_experts_per_tok=k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    torch.manual_seed(0)
    for weight in block.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return block


def our_layer(shape: tuple[int, ...], dispatch: str, peer: nn.Module) -> MoE:
    """The same layer, with the same weights."""
    _, width, hidden, experts, k = shape
    router = TopKRouter(width, experts, k)
    layer = MoE(router, Experts(experts, width, hidden), dispatch=dispatch)
    with torch.no_grad():
        layer.router.weight.copy_(peer.gate.weight)
        layer.experts.w_up.copy_(peer.experts.gate_up_proj)
        layer.experts.w_down.copy_(peer.experts.down_proj)
    return layer


def contenders(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """All layers by name, an input and a gradient of the output; fails unless all give the same output."""
    peers = {name: peer_block(shape, name.split()[1]) for name in PEERS}
    layers = {name: our_layer(shape, name, peers[PEERS[0]]) for name in OURS} | peers
    x = torch.randn(1, *shape[:2])
    with torch.no_grad():
        want = peers[PEERS[0]](x)
        for layer in layers.values():
            torch.testing.assert_close(output(layer, x), want, rtol=1e-4, atol=1e-5)
    layers = {name: layer.to(dtype) for name, layer in layers.items()}
    x = x.to(dtype).requires_grad_()
    return layers, x, torch.randn_like(x)


def output(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def step(layer: nn.Module, x: Tensor, grad: Tensor, passes: str) -> None:
    if passes == "forward":
        with torch.no_grad():
            output(layer, x)
    else:
        output(layer, x).backward(grad)


def forget_gradients(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    x.grad = None


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of tensors that were alive at once, beyond those before the call, as torch's allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def compare(
    shape: tuple[int, ...], dtype: torch.dtype, passes: str, rounds: int
) -> list[dict[str, Any]]:
    """One row for each contender."""
    layers, x, grad = contenders(shape, dtype)
    times: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for turn in range(rounds + 1):  # the first warms up
        names.append(names.pop(0))
        for name in names:
            forget_gradients(layers[name], x)
            start = time.process_time()
            step(layers[name], x, grad, passes)
            times[name].append(1e3 * (time.process_time() - start))
        if turn == 0:
            times = {name: [] for name in layers}
    median = {name: statistics.median(values) for name, values in times.items()}
    best = min(PEERS, key=median.__getitem__)

    def ratio(name: str, to: str) -> float:
        pairs = zip(times[name], times[to], strict=True)
        return statistics.median(a / b for a, b in pairs)

    rows = []
    for name in OURS + PEERS:
        forget_gradients(layers[name], x)
        memory = peak_bytes(lambda name=name: step(layers[name], x, grad, passes))
        rows.append(
            dict(zip("TDFEK", shape, strict=True))
            | {
                "dtype": str(dtype).removeprefix("torch."),
                "passes": passes,
                "contender": name,
                "cpu_time_ms": round(median[name], 2),
                "ratio_to_best_peer": round(ratio(name, best), 3),
                "ratio_to_eager": round(ratio(name, PEERS[0]), 3),
                "peak_memory_mib": round(memory / 2**20, 3),
            }
        )
    return rows


MEASURED = ("cpu_time_ms", "ratio_to_best_peer", "ratio_to_eager", "peak_memory_mib")


def in_a_process(*case: Any) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return compare(*case)


def over_processes(processes: int, *case: Any) -> list[dict[str, Any]]:
    """Each contender's row with the median of what so many fresh processes measured, one after the other."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        runs = [pool.apply(in_a_process, case) for _ in range(processes)]
    return [
        same[0]
        | {
            key: round(statistics.median(row[key] for row in same), 3)
            for key in MEASURED
        }
        for same in zip(*runs, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="in each process")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD}")
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            for passes in PASSES:
                case = (shape, dtype, passes, options.rounds)
                found = over_processes(options.processes, *case)
                rows += found
                sizes = " ".join(f"{k}{n}" for k, n in zip("TDFEK", shape, strict=True))
                print(f"\n{sizes}, {found[0]['dtype']}, {passes}")
                for row in found:
                    print(
                        f"  {row['contender']:24} {row['cpu_time_ms']:8.1f} ms"
                        f"   {row['ratio_to_best_peer']:5.2f} of their best"
                        f"   {row['ratio_to_eager']:5.2f} of eager"
                        f"   {row['peak_memory_mib']:7.1f} MiB",
                        flush=True,
                    )
    if options.record:
        counts = f"--rounds {options.rounds} --processes {options.processes}"
        command = f"python benchmarks/dispatch.py {counts} --record"
        packages = ("torch", "transformers")
        records.save(records.measure("dispatch_cpu", command, rows, packages), RECORD)


if __name__ == "__main__":
    main()
