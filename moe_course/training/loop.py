"""Training of small language models: one loop that logs what it cost; on a CPU a resumed run equals the whole one.

Everything runs in float32, on a CPU or a GPU: models this small gain nothing from bf16, and the records of different
machines stay comparable.

Chapter: book/math/compute_equivalence.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from moe_course.balance import assignments, load_balancing_loss
from moe_course.layers import Routing
from moe_course.specs import GQA, ModelSpec
from moe_course.training.data import Batches

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Raises ValueError on a recipe that cannot be followed."""

    steps: int
    peak_lr: float = 3e-3
    warmup: int = 50  # steps
    final_lr: float = 0.1  # of the peak
    weight_decay: float = 0.1  # on matrices alone
    clip: float = 1.0  # greatest norm of the gradient
    balance: float = 0.01  # weight of the load-balancing loss
    rows: int = 10  # of the log, evenly spaced, besides the one before the first step
    checkpoints: int = 20  # evenly spaced
    held_out_windows: int = 64  # of each domain, in every row but the last
    final_windows: int = 512  # in the last row

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"need at least 1 step and a warm-up within them, got {self.steps} and {self.warmup}"
            )
        if self.peak_lr <= 0 or self.clip <= 0 or self.rows < 1 or self.checkpoints < 1:
            raise ValueError(
                "peak_lr, clip, rows and checkpoints must be positive, got "
                f"{self.peak_lr}, {self.clip}, {self.rows} and {self.checkpoints}"
            )

    def is_due(self, done: int, times: int) -> bool:
        """Whether something to happen `times` times, the last time at the end, happens after step `done`."""
        return done * times // self.steps > (done - 1) * times // self.steps


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up to the peak, then half a cosine down to `final_lr` of it.

    lr = peak · (step + 1) / warmup                                while step < warmup
    lr = peak · (r + (1 - r)·(1 + cos(pi·u)) / 2)                  u from 0 to 1 over the rest
    """
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    u = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    cosine = (1 + math.cos(math.pi * u)) / 2
    return recipe.peak_lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def flops_per_token(spec: ModelSpec, context: int) -> int:
    """Training FLOPs of one token: 6 for each active weight, and attention's two products.

        6·N + 6·L·H·(d_qk + d_v)·S        N active weights, without the input embedding

    A weight costs 2 FLOPs forward (multiply, add) and 4 backward (by input, by weight):
    arXiv:2001.08361, section 2.1. Attention is counted as S x S, the causal half
    included, as torch's counter does. Norm weights are in N though they are no
    matrices; softmax, norms and activations are left out.
    """
    attention = spec.attention
    if isinstance(attention, GQA):
        widths = 2 * attention.head_dim
    else:
        widths = attention.nope_dim + attention.rope_dim + attention.v_dim
    per_layer = attention.heads * widths * context
    weights = spec.active_params(include_embedding=False)
    return 6 * weights + 6 * spec.layers * per_layer


def mean_balancing_loss(routings: list[Routing]) -> Float[Tensor, ""]:
    """The load-balancing loss, mean over the sparse layers; 0 for a dense model."""
    losses = [load_balancing_loss(r, r.probs.shape[-1]) for r in routings]
    return torch.stack(losses).mean() if losses else torch.zeros(())


def load_per_expert(routings: list[Routing]) -> list[list[float]]:
    """Share of the assignments that each expert of each sparse layer received, as [layer][expert]."""
    shares = []
    for routing in routings:
        counts = assignments(routing)
        shares.append((counts / max(1, routing.expert_ids.numel())).tolist())
    return shares


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    text: UInt8[Tensor, " N"],
    context: int,
    windows: int,
    batch_size: int = 64,
) -> float:
    """Mean loss in bits per byte on windows spread evenly over `text`, all of them if there are fewer.

        cross entropy / ln 2

    Every byte of a window is predicted from those before it in the window.
    """
    available = (len(text) - 1) // context
    if available < 1:
        raise ValueError(f"{len(text)} bytes hold no window of {context}")
    windows = min(windows, available)
    device = next(model.parameters()).device
    starts = torch.arange(windows) * available // windows * context
    training = model.training
    model.eval()
    total = 0.0
    for some in starts.split(batch_size):
        at = some[:, None] + torch.arange(context + 1)
        window = text[at].long().to(device)  # [B, S + 1]
        logits, _ = model(window[:, :-1])
        total += F.cross_entropy(
            logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train(training)
    return total / (windows * context) / math.log(2)


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    flops_per_token: float,
    held_out: Mapping[str, UInt8[Tensor, " N"]],
    auxiliary: Callable[[list[Routing]], Tensor] = mean_balancing_loss,
    checkpoint: Path | None = None,
    on_step: Callable[[int], None] | None = None,
    after_step: Callable[[nn.Module, list[Routing]], None] | None = None,
    rate: Callable[[str], float] = lambda name: 1.0,
    prepare: Callable[[torch.optim.Optimizer], object] | None = None,
    schedule: Callable[[int, Recipe], float] = learning_rate,
) -> list[Row]:
    """Train `model` in place and return the log.

    loss = cross entropy + recipe.balance · auxiliary(routings)

    model: maps byte ids [B, S] to (logits [B, S, V], one Routing for each sparse layer).
    held_out: text of each domain that the log reports on.
    auxiliary: is not called for a model without routings.
    checkpoint: a file. If it is there the run goes on from it, and its log is the one
        that an uninterrupted run would have written, seconds apart.
    on_step: called with the number of steps done.
    after_step: called with the model and the routings of the step, after the optimizer's
        part of it: sets biases, or looks at loads.
    rate: what the learning rate of a parameter is multiplied by, for its name; frozen
        parameters (requires_grad=False) are not the optimizer's at all.
    prepare: called with the optimizer before the first step.
    schedule: the learning rate of step 0, 1, ...

    A row holds `step`, `bytes` seen, `flops`, `seconds` of training (evaluation and
    checkpoints not counted), `lr`, `train_bits` per byte (mean since the last row),
    `bits` per byte on each held-out domain, `balance` (the auxiliary loss) and `load`
    (shares by layer and expert in the last batch).

    Raises ValueError when the batches are too few, or a checkpoint is of another run;
    FloatingPointError when the loss is no longer finite.
    """
    if recipe.steps > len(batches):
        raise ValueError(
            f"{recipe.steps} steps need as many batches, {batches.passes} pass(es) hold {len(batches)}"
        )
    device = next(model.parameters()).device
    optimizer = _adamw(model, recipe, rate)
    if prepare is not None:
        prepare(optimizer)
    identity = _identity(model, batches, recipe)
    rows: list[Row] = []
    done, seconds, nats, since = 0, 0.0, 0.0, 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["identity"] != identity:
            raise ValueError(
                f"{checkpoint} belongs to another run: {state['identity']}"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        rows, done, seconds = state["rows"], state["done"], state["seconds"]
        nats, since = state["nats"], state["since"]

    def log(balance: float, load: list[list[float]]) -> None:
        last = done == recipe.steps
        windows = recipe.final_windows if last else recipe.held_out_windows
        tokens = done * batches.tokens_per_step
        rows.append(
            {
                "step": done,
                "bytes": tokens,
                "flops": tokens * flops_per_token,
                "seconds": seconds,
                "lr": schedule(done - 1, recipe) if done else 0.0,
                "train_bits": nats / since / math.log(2) if since else None,
                "bits": {
                    name: bits_per_byte(model, text, batches.context, windows)
                    for name, text in held_out.items()
                },
                "balance": balance,
                "load": load,
            }
        )

    if not rows:
        log(0.0, [])
    model.train()
    begin = time.perf_counter()
    while done < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(done, recipe)
        inputs, targets = (part.to(device) for part in batches[done])
        logits, routings = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        extra = auxiliary(routings) if routings else loss.new_zeros(())
        optimizer.zero_grad(set_to_none=True)
        (loss + recipe.balance * extra).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if after_step is not None:
            after_step(model, routings)
        done += 1
        nats, since = nats + loss.item(), since + 1
        if not math.isfinite(nats):
            raise FloatingPointError(f"the loss is not finite at step {done}")
        row_due = recipe.is_due(done, recipe.rows)
        save_due = checkpoint is not None and recipe.is_due(done, recipe.checkpoints)
        if row_due or save_due:
            if device.type == "cuda":  # the clock must not stop before the GPU does
                torch.cuda.synchronize(device)
            seconds += time.perf_counter() - begin
            if row_due:
                log(extra.item(), load_per_expert(routings))
                nats, since = 0.0, 0
            if save_due and checkpoint is not None:
                _save(
                    {
                        "identity": identity,
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "rng": torch.get_rng_state(),
                        "rows": rows,
                        "done": done,
                        "seconds": seconds,
                        "nats": nats,
                        "since": since,
                    },
                    checkpoint,
                )
            begin = time.perf_counter()
        if on_step is not None:
            on_step(done)
    return rows


def _adamw(
    model: nn.Module, recipe: Recipe, rate: Callable[[str], float]
) -> torch.optim.AdamW:
    together: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            # Vectors are norms and biases: shrinking them changes scales, not complexity.
            decay = recipe.weight_decay if p.ndim > 1 else 0.0
            together.setdefault((decay, rate(name)), []).append(p)
    groups = [
        {"params": params, "weight_decay": decay, "rate": factor}
        for (decay, factor), params in together.items()
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True)


def _identity(model: nn.Module, batches: Batches, recipe: Recipe) -> dict[str, Any]:
    """What must agree for a checkpoint to be of the same run."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    digest = hashlib.sha256(batches.text.numpy().tobytes())
    for order in batches.orders:
        digest.update(order.numpy().tobytes())
    return {
        "recipe": asdict(recipe),
        "shapes": shapes,
        "batches": [batches.context, batches.batch_size, digest.hexdigest()],
    }


def _save(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all: a run that is killed while saving keeps the checkpoint before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def state_bytes(model: nn.Module) -> int:
    """Memory of training that lasts between steps: weight, gradient and AdamW's two moments, 4 B each."""
    return 16 * sum(p.numel() for p in model.parameters())
