"""The two cost functions of the course's source texts, with their names, arguments and figures.

They are kept as they are printed there (indented, which the print is not), so that a reader can call them and get the
figures of the texts. What each leaves out is said in its docstring; `costs.latency`, `costs.memory` and
`costs.training` hold what takes their place.

Chapter: book/bandwidth/roofline.
"""

from __future__ import annotations

from typing import Any


def moe_efficiency_analysis(
    dense_params_B: float,
    moe_total_params_B: float,
    moe_active_params_B: float,
    tokens_per_day: float,
    gpu_flop_per_second: float = 312e12,
    gpu_count: int = 64,
) -> dict[str, float]:
    """Training throughput and weight memory of a dense and a sparse model, as the sources compute them; prints both.

        tokens/day = 0.45 · gpu_flop_per_second · gpu_count · 86400 / (6 · active parameters)
        memory     = 2 bytes · total parameters

    Parameters in billions. What to know: the argument tokens_per_day is not used; the memory is labelled GB and is in
    GiB (2^30 bytes); the "penalty" it prints is a saving in the sources' own example; 45 % utilisation is built in;
    only weights are counted, not gradients, optimiser, activations or communication.
    """
    dense_flops = 6 * dense_params_B * 1e9
    moe_flops = 6 * moe_active_params_B * 1e9
    per_day = gpu_flop_per_second * gpu_count * 86400 * 0.45
    dense_tokens, moe_tokens = per_day / dense_flops, per_day / moe_flops
    dense_memory = dense_params_B * 1e9 * 2 / 1024**3
    moe_memory = moe_total_params_B * 1e9 * 2 / 1024**3
    print("=== Training Efficiency Comparison ===")
    for label, flops, tokens, memory in (
        (f"Dense model ({dense_params_B}B params)", dense_flops, dense_tokens, dense_memory),
        (
            f"MoE model ({moe_total_params_B}B total, {moe_active_params_B}B active)",
            moe_flops, moe_tokens, moe_memory,
        ),
    ):  # fmt: skip
        print(f"{label}:")
        print(f" FLOPs/token: {flops:.2e}")
        print(f" Tokens/day: {tokens:.2e}")
        print(f" Memory (FP16): {memory:.0f} GB")
        print()
    speedup, overhead = moe_tokens / dense_tokens, moe_memory / dense_memory
    print("=== Trade-off ===")
    print(f" Compute advantage (MoE processes {speedup:.1f}x more tokens/day)")
    print(f" Memory penalty (MoE needs {overhead:.1f}x more memory)")
    return {
        "dense_tokens_per_day": dense_tokens,
        "moe_tokens_per_day": moe_tokens,
        "compute_speedup": speedup,
        "memory_dense_GB": dense_memory,
        "memory_moe_GB": moe_memory,
        "memory_overhead": overhead,
    }


def estimate_inference_latency(
    model_params_B: float,
    active_params_B: float,
    batch_size: int,
    seq_len: int,
    hbm_bandwidth_TB_s: float = 2.0,
    tflops: float = 312.0,
) -> dict[str, Any]:
    """Time of one step, as the sources compute it: all stored weights are read.

        time = max(2 bytes · stored parameters / bandwidth,
                   2 · active parameters · tokens / FLOP rate)

    Parameters in billions. What to know: a sparse model reads only the experts that
    some token of the batch chose, so this is wrong for it below some tens of tokens
    (`costs.decode_step`); KV cache, attention, communication and launch overhead are
    left out, and a model that does not fit the memory gets a time all the same.
    """
    memory_s = model_params_B * 1e9 * 2 / (hbm_bandwidth_TB_s * 1e12)
    tokens = batch_size * seq_len
    compute_s = 2 * active_params_B * 1e9 * tokens / (tflops * 1e12)
    total_s = max(memory_s, compute_s)
    return {
        "memory_read_time_ms": memory_s * 1000,
        "compute_time_ms": compute_s * 1000,
        "total_time_ms": total_s * 1000,
        "bottleneck": "memory" if memory_s > compute_s else "compute",
        "throughput_tokens_per_sec": tokens / total_s,
    }
