"""Experiments that take longer than a chapter may: resumable, each with one record.

    python -m moe_course.training.experiments compute-equivalence            about an hour and three quarters on 2 cores
    python -m moe_course.training.experiments compute-equivalence --quick    under half a minute

An experiment consists of arms, one training run each. A finished arm is a JSON file, an unfinished one has a
checkpoint: the same command goes on where it was stopped.

Chapter: book/math/compute_equivalence.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from moe_course import records
from moe_course.layers.routing import renormalised, softmax_top_k
from moe_course.layers.transformer import Transformer
from moe_course.processes import end_with_parent
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts
from moe_course.training import data, loop

RECORD = records.FOLDER / "compute_equivalence.json"
FOLDER = Path("_build/experiments")

# What an arm is trained on: equally many unique bytes, of one domain or of all.
DATA: dict[str, tuple[str, ...]] = {"one": ("prose",), "many": data.DOMAINS}


Model = tuple[int, int, int]  # what sets a model's shape: experts, k, widening


@dataclass(frozen=True)
class Arm:
    """One training run. The seed sets the initial weights and the order of the text, not which text."""

    experts: int  # 1: dense
    data: str  # key of DATA
    seed: int
    k: int = 2  # experts per token; without meaning in a dense model
    widening: int = 1  # hidden size of the FFN, in multiples of the setup's
    lr: float = 1.0  # peak learning rate, in multiples of the recipe's

    @property
    def model(self) -> Model:
        return self.experts, self.k, self.widening

    @property
    def name(self) -> str:
        return f"{self.data}-e{self.experts:02}-k{self.k}-x{self.widening}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Setup:
    """What all arms of an experiment share, and what is varied.

    Every model has the same width, layers and attention. The dense one has FFNs of
    `hidden`; the sparse ones choose k of E experts of hidden / k, so that a token meets
    equally many FFN weights in each. The router's D·E weights per layer come on top.
    """

    experts: tuple[int, ...]  # 1: dense
    data: tuple[str, ...]  # keys of DATA
    seeds: tuple[int, ...]
    width: int
    layers: int
    heads: int
    hidden: int
    context: int
    batch_size: int
    unique_bytes: int
    passes: int
    recipe: loop.Recipe
    others: tuple[Arm, ...] = ()  # beside every combination of experts, data and seeds

    def spec(self, arm: Arm) -> ModelSpec:
        """The model of an arm. Raises ValueError where k does not divide its hidden size."""
        hidden, sparse = arm.widening * self.hidden, None
        if arm.experts > 1:
            if hidden % arm.k:
                raise ValueError(f"k ({arm.k}) must divide hidden ({hidden})")
            sparse = RoutedExperts(arm.experts, arm.k, FFN(hidden // arm.k))
        return ModelSpec(
            name=f"E={arm.experts}, k={arm.k}" if sparse else f"dense, {hidden}",
            layers=self.layers,
            width=self.width,
            vocab=data.VOCAB,
            attention=GQA(self.heads, self.heads, self.width // self.heads),
            ffn=None if sparse else FFN(hidden),
            moe=sparse,
        )

    def transformer(self, arm: Arm) -> Transformer:
        """Its weights follow from torch's generator.

        The gates of k > 1 experts sum to 1, as in Mixtral. A single one would then be 1 whatever the router says, and
        the router would learn nothing from the loss: with k = 1 the gate is the probability itself, as in Switch.
        """
        return Transformer(
            self.spec(arm), softmax_top_k if arm.k == 1 else renormalised
        )

    def arms(self) -> list[Arm]:
        """All arms, seed by seed: a run that is cut short has whole comparisons."""
        grid = [
            Arm(experts, which, seed)
            for seed in self.seeds
            for which in self.data
            for experts in self.experts
        ]
        return sorted(grid + list(self.others), key=lambda arm: arm.seed)


def _setup(
    context: int, batch_size: int, unique_bytes: int, passes: int = 1, **rest: Any
) -> Setup:
    """A Setup whose steps use up the text."""
    windows = (unique_bytes - 1) // context
    recipe = replace(rest.pop("recipe"), steps=passes * (windows // batch_size))
    return Setup(
        context=context,
        batch_size=batch_size,
        unique_bytes=unique_bytes,
        passes=passes,
        recipe=recipe,
        **rest,
    )


_SEEDS = (0, 1, 2)
FULL = _setup(
    experts=(1, 4, 8, 32),
    data=("one", "many"),
    seeds=_SEEDS,
    width=128,
    layers=4,
    heads=4,
    hidden=384,
    context=128,
    batch_size=16,
    unique_bytes=2_400_000,
    recipe=loop.Recipe(
        steps=200, warmup=100, peak_lr=3e-3, held_out_windows=32, final_windows=256
    ),
    others=(
        # Finer or coarser experts: as many weights in all, and as many per token, as 8 experts of which 2 work.
        *(Arm(4 * k, "many", seed, k) for seed in _SEEDS for k in (1, 4)),
        # What a larger dense model makes of the same text: the measure of what the experts are worth.
        *(Arm(1, "many", seed, widening=x) for seed in _SEEDS for x in (2, 4)),
        # Whether one learning rate is fair to both.
        *(Arm(experts, "many", 0, lr=x) for experts in (1, 8) for x in (0.5, 2.0)),
    ),
)
QUICK = _setup(
    experts=(1, 8),
    data=("one", "many"),
    seeds=(0,),
    width=64,
    layers=2,
    heads=2,
    hidden=192,
    context=64,
    batch_size=8,
    unique_bytes=100_000,
    recipe=loop.Recipe(steps=100, warmup=20, peak_lr=5e-3, rows=5, final_windows=128),
)


def run_arm(
    arm: Arm,
    setup: Setup,
    folder: Path,
    on_step: Callable[[int], None] | None = None,
    fresh_process: bool = False,
) -> dict[str, Any]:
    """Train one arm, or go on with it, or read its result.

    fresh_process: nothing else ran in this process, so its peak of memory is the arm's.
    Raises ValueError when `folder` holds results of another setup.
    """
    path, checkpoint = folder / f"{arm.name}.json", folder / f"{arm.name}.pt"
    # Not which other arms there are: an experiment may grow.
    shared = {
        k: v
        for k, v in asdict(setup).items()
        if k not in ("experts", "data", "seeds", "others")
    }
    settings = {"arm": asdict(arm), "setup": _plain(shared)}
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if {key: result[key] for key in settings} != settings:
            raise ValueError(f"{path} is of another setup: choose another folder")
        return result
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    domains, spec = DATA[arm.data], setup.spec(arm)
    text = data.load(domains, "train", setup.unique_bytes)
    batches = data.Batches(
        text, setup.context, setup.batch_size, arm.seed, setup.passes
    )
    held_out = {domain: data.load([domain], "held_out") for domain in domains}
    torch.manual_seed(arm.seed)
    model = setup.transformer(arm).to(device)
    rows = loop.train(
        model,
        batches,
        replace(setup.recipe, peak_lr=arm.lr * setup.recipe.peak_lr),
        flops_per_token=loop.flops_per_token(spec, setup.context),
        held_out=held_out,
        checkpoint=checkpoint,
        on_step=on_step,
    )
    result = settings | {
        "total_params": spec.total_params(),
        "active_params": spec.active_params(include_embedding=False),
        "state_bytes": loop.state_bytes(model),
        "peak_memory_bytes": _peak_memory(device) if fresh_process else None,
        "threads": torch.get_num_threads(),
        "device": records.device_name(),
        "rows": rows,
    }
    records.write_json(result, path)
    checkpoint.unlink(missing_ok=True)
    return result


def _plain(value: Any) -> Any:
    """As JSON reads it back: lists for tuples."""
    return json.loads(json.dumps(value))


def _peak_memory(device: torch.device) -> int | None:
    """The most memory that this process has held, in bytes, torch itself included (on a GPU: that tensors have held).

    None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def record_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one arm as a record holds them: flat, each with what it was run with.

    `held_out_bits` is the mean over the arm's domains, in bits per byte; `max_load` the
    largest share that an expert of any layer received, in multiples of an even share.
    """
    arm, setup = result["arm"], result["setup"]
    for row in result["rows"]:
        bits = row["bits"]
        flat = {"data": arm["data"], "experts": arm["experts"], "seed": arm["seed"]}
        flat["k"] = arm["k"] if arm["experts"] > 1 else 1
        flat["hidden"] = arm["widening"] * setup["hidden"]
        flat["peak_lr"] = arm["lr"] * setup["recipe"]["peak_lr"]
        flat |= {key: row[key] for key in ("step", "bytes", "flops")}
        flat["seconds"] = round(row["seconds"], 2)
        flat["held_out_bits"] = round(sum(bits.values()) / len(bits), 5)
        flat |= {f"{name}_bits": round(value, 5) for name, value in bits.items()}
        flat["train_bits"] = row["train_bits"] and round(row["train_bits"], 5)
        shares = [share for layer in row["load"] for share in layer]
        flat["max_load"] = round(max(shares) * arm["experts"], 3) if shares else None
        for key in ("total_params", "active_params", "state_bytes"):
            flat[key] = result[key]
        flat["peak_memory_bytes"] = result["peak_memory_bytes"]
        flat["threads"] = result["threads"]
        yield flat


def compute_equivalence(setup: Setup, folder: Path) -> list[dict[str, Any]]:
    """All arms of `setup`, one after the other in this process; returns the record's rows."""
    return [
        row for arm in setup.arms() for row in record_rows(run_arm(arm, setup, folder))
    ]


# --- In processes of their own -------------------------------------------------------

_progress: Any = None  # in a worker: the queue to its parent


def _start_worker(queue: Any) -> None:
    global _progress
    _progress = queue
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # These models are too small to share among cores, and the seconds of an arm must not depend on their number.
    torch.set_num_threads(1)


def _work(arm: Arm, setup: Setup, folder: Path) -> dict[str, Any]:
    def tell(done: int) -> None:
        if done % 10 == 0 or done == setup.recipe.steps:
            _progress.put((arm.name, done))

    return run_arm(arm, setup, folder, on_step=tell, fresh_process=True)


def _step_seconds(setup: Setup, arm: Arm, steps: int = 6) -> float:
    """Seconds of one training step, of a few on text that does not matter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = torch.randint(data.VOCAB, (setup.context * setup.batch_size * (steps + 4),))
    batches = data.Batches(
        text.to(torch.uint8), setup.context, setup.batch_size, seed=0
    )
    recipe = replace(setup.recipe, steps=steps + 2, warmup=0, rows=steps + 2)
    rows = loop.train(
        setup.transformer(arm).to(device),
        batches,
        recipe,
        flops_per_token=0,
        held_out={},
    )
    return float(rows[-1]["seconds"] - rows[2]["seconds"]) / steps


def _step_times(setup: Setup, arms: list[Arm], rounds: int = 5) -> dict[Model, float]:
    """Seconds of a training step of each model, side by side: the median of `rounds`, the models in turn in each.

    What the arms took themselves depends on what else the machine did in these hours; these times may be compared.
    """
    models = {arm.model: arm for arm in arms}
    times: dict[Model, list[float]] = {model: [] for model in models}
    for _ in range(rounds):
        for model, arm in models.items():
            times[model].append(_step_seconds(setup, arm))
    return {model: statistics.median(each) for model, each in times.items()}


def _pool(jobs: int) -> tuple[ProcessPoolExecutor, Any]:
    # A process for each arm: its peak of memory is its own. Spawned: a fork of a process that uses torch may hang.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(
        jobs, context, _start_worker, (queue,), max_tasks_per_child=1
    )
    return pool, queue


def run_all(setup: Setup, folder: Path, jobs: int) -> list[dict[str, Any]]:
    """All arms, `jobs` at a time on one thread each, with the plan first and then a line of progress."""
    arms = setup.arms()
    open_arms = [a for a in arms if not (folder / f"{a.name}.json").exists()]
    pool, queue = _pool(jobs)
    try:
        models = {arm.model: arm for arm in open_arms}  # one arm of each shape
        each = pool.map(_step_seconds, [setup] * len(models), models.values())
        cost = dict(zip(models, each, strict=True))  # seconds of a step
        _print_plan(setup, arms, open_arms, cost, jobs)
        futures = [pool.submit(_work, arm, setup, folder) for arm in open_arms]
        _watch(futures, open_arms, cost, setup.recipe.steps, queue)
        times = pool.submit(_step_times, setup, arms).result()
    except BaseException:
        # Ctrl-C and failures: end the workers rather than wait for them; their checkpoints stay.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [
        row | {"step_ms": round(1e3 * times[arm.model], 2)}
        for arm in arms
        for row in record_rows(run_arm(arm, setup, folder))
    ]


def _print_plan(
    setup: Setup,
    arms: list[Arm],
    open_arms: list[Arm],
    cost: dict[Model, float],
    jobs: int,
) -> None:
    tokens = setup.recipe.steps * setup.batch_size * setup.context
    print(
        f"{len(arms)} arms, {len(arms) - len(open_arms)} of them done; {setup.recipe.steps} steps of "
        f"{setup.batch_size} x {setup.context} bytes each: {tokens:,} bytes, {setup.unique_bytes:,} unique"
    )
    for model, arm in {arm.model: arm for arm in open_arms}.items():
        spec = setup.spec(arm)
        print(
            f"  {spec.name:<12} total {spec.total_params():>12,}  active {spec.active_params(False):>10,}  "
            f"{loop.flops_per_token(spec, setup.context) / 1e6:6.2f} MFLOP/byte  {1e3 * cost[model]:6.0f} ms/step"
        )
    left = sum(cost[arm.model] * setup.recipe.steps for arm in open_arms) / jobs
    print(f"estimate: {_duration(left)} with {jobs} at a time", flush=True)


def _watch(
    futures: list[Future[dict[str, Any]]],
    arms: list[Arm],
    cost: dict[Model, float],
    steps: int,
    queue: Any,
) -> None:
    """Show progress until all are done; raises what an arm raised."""
    price = {arm.name: cost[arm.model] for arm in arms}
    total = steps * sum(price.values())
    done: dict[str, int] = {}
    first: dict[str, int] = {}  # a resumed arm does not begin at 0
    begin = shown = time.monotonic()
    while True:
        waiting = [future for future in futures if not future.done()]
        for future in futures:
            if future.done():
                future.result()
        try:
            while True:
                name, step = queue.get(timeout=0.5 if waiting else 0)
                first.setdefault(name, step)
                done[name] = step
                if time.monotonic() - shown > 0.5:
                    break
        except Empty:
            pass
        spent = sum(price[name] * step for name, step in done.items())
        worked = spent - sum(price[name] * step for name, step in first.items())
        elapsed = time.monotonic() - begin
        left = (total - spent) * elapsed / worked if worked else None
        finished = len(futures) - len(waiting)
        _bar(spent / total if total else 1.0, finished, len(futures), elapsed, left)
        shown = time.monotonic()
        if not waiting:
            break
    print(file=sys.stderr)


def _bar(
    share: float, finished: int, arms: int, elapsed: float, left: float | None
) -> None:
    filled = int(30 * min(1.0, share))
    line = (
        f"[{'#' * filled}{'.' * (30 - filled)}] {100 * share:3.0f} %  "
        f"{finished}/{arms} arms  {_duration(elapsed)} gone"
        + (f"  {_duration(left)} left" if left is not None else "")
    )
    print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_course.training.experiments",
        description="Long experiments. The same command goes on where it was stopped.",
    )
    parser.add_argument("experiment", choices=["compute-equivalence"])
    parser.add_argument(
        "--quick", action="store_true", help="the small version of the chapter"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the arms (default: in {FOLDER})"
    )
    parser.add_argument(
        "--record",
        type=Path,
        help=f"where the record goes (default: {RECORD}; with --quick, the arms' folder)",
    )
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=int, default=cores, help="arms at a time (default: the cores)"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    setup = QUICK if options.quick else FULL
    name = options.experiment + ("-quick" if options.quick else "")
    folder = options.out or FOLDER / name
    record = options.record or (folder / RECORD.name if options.quick else RECORD)
    jobs = min(options.jobs, len(setup.arms()))
    command = f"python -m moe_course.training.experiments {options.experiment}"
    try:
        rows = run_all(setup, folder, jobs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from {folder}", file=sys.stderr)
        return 130
    quick = " --quick" if options.quick else ""
    measured = records.measure("compute_equivalence", command + quick, rows)
    records.save(measured, record)
    print(f"{record}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
