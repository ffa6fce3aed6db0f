"""Decode steps on one CPU thread against the cost model: the bound of the roofline, and the sum of products.

    python benchmarks/decode.py [--rounds 7] [--record]

Three models of random weights take turns (`moe_course.measure.decode_specs`), at eight batches. The rates that go
into the prediction are measured in the same process, from a matrix-vector product, a matrix product, and products with
few rows; nothing is fitted to the steps themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_course import costs, measure, records
from moe_course.specs import accelerators

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
RECORD = Path("moe_course/data/records/decode_cpu.json")


def rows(rounds: int) -> list[dict[str, Any]]:
    """Rates, products and steps, one row each; `kind` says which."""
    bandwidth, flops = measure.read_bandwidth(), measure.flop_rate()
    each = measure.seconds_per_weight(ROWS)
    specs = measure.decode_specs()
    found: list[dict[str, Any]] = [
        {"kind": "rates", "bandwidth_GB_s": bandwidth / 1e9, "GFLOP_s": flops / 1e9}
    ]
    for n, seconds in each.items():
        found.append({"kind": "product", "rows": n, "ns_per_weight": seconds * 1e9})
    precision = costs.Precision(measure.BYTES, cache=measure.BYTES)
    for batch, times in measure.decode_seconds(specs, BATCHES, rounds).items():
        for name, seconds in times.items():
            bound = costs.decode_step(
                specs[name], accelerators["H200"], batch, precision=precision,
                bandwidth=bandwidth, flops=flops,
            ).time_s  # fmt: skip
            products = measure.step_from_products(specs[name], batch, each)
            row = {"kind": "step", "model": name, "batch": batch, "ms": seconds * 1e3}
            row |= {"bound_ms": bound * 1e3, "products_ms": products * 1e3}
            found.append(row)
            print(
                f"{name:<13} batch {batch:>3}: {row['ms']:6.1f} ms, bound {row['bound_ms']:6.1f}, "
                f"products {row['products_ms']:6.1f}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD}")
    options = parser.parse_args()
    found = rows(options.rounds)
    if options.record:
        command = f"python benchmarks/decode.py --rounds {options.rounds} --record"
        record = records.measure("Decode steps on a CPU", command, found)
        records.save(record, RECORD)


if __name__ == "__main__":
    main()
