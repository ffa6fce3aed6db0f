"""LoRA on the experts of a sparse layer (arXiv:2106.09685), whose weights are stacked.

    W_e x  becomes  W_e x + s_e · B_e A_e x          A_e [r, in], B_e [out, r], B_e = 0 at the start

for the up projections (gate and up) and the down projection of every expert, or of some. All A and all B are stacks,
so many experts are one grouped product, and B A is never formed except to merge it into W.

Adapters are kept in float32 at least, over weights in whatever they are stored in: a number in 16 bits does not move
by less than about a 256th of itself, and small steps are lost. What they add is rounded once, with the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_course.layers import DecoderBlock, Experts, MoE, Slots
from moe_course.layers.dispatch import combine, gather, product, slot_ends
from moe_course.layers.experts import GATED

Ranks = int | Sequence[int]


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or what is wider."""
    return torch.promote_types(dtype, torch.float32)


class LowRank(nn.Module):
    """s_e · B_e A_e for each of E matrices [out, in]: what LoRA adds to them.

    ranks: of every matrix, or one for each; 0 leaves that matrix alone. Stacks are as deep as the largest rank, and
        what a smaller one does not use stays exactly 0.
    parts: 2 gives the upper and the lower half of the rows an A of their own (gate and up projection), where 1 lets
        them share it, as PEFT does with a fused projection.
    rs: s = alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732) in place of alpha / r.
    dropout: of the input, not of the r numbers behind A.
    """

    scale: Float[Tensor, "n r"]
    place: Int[Tensor, " E"]

    def __init__(
        self,
        num_experts: int,
        inputs: int,
        outputs: int,
        ranks: Ranks = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rs: bool = False,
        parts: int = 1,
    ) -> None:
        super().__init__()
        each = [ranks] * num_experts if isinstance(ranks, int) else list(ranks)
        if len(each) != num_experts or min(each) < 0 or max(each) < 1:
            raise ValueError(
                f"ranks must be a positive number, or {num_experts} numbers from 0 on with one above 0, got {ranks}"
            )
        adapted = [e for e, rank in enumerate(each) if rank]
        used = torch.tensor([each[e] for e in adapted])
        most = max(each)
        self.parts, self.dropout = parts, dropout
        place = torch.full((num_experts,), -1)
        place[adapted] = torch.arange(len(adapted))
        self.register_buffer("place", place, persistent=False)
        in_use = torch.arange(most) < used[:, None]  # [n, r]
        s = alpha / (used.sqrt() if rs else used)
        self.register_buffer("scale", in_use * s[:, None], persistent=False)
        # As nn.Linear starts: uniform within 1/sqrt(inputs).
        a = torch.empty(len(adapted), parts, most, inputs)
        nn.init.uniform_(a, -(inputs**-0.5), inputs**-0.5)
        self.a = nn.Parameter((a * in_use[:, None, :, None]).flatten(1, 2))
        self.b = nn.Parameter(torch.zeros(len(adapted), outputs, most))

    def forward(
        self, rows: Float[Tensor, "S inputs"], expert: Int[Tensor, " S"]
    ) -> Float[Tensor, "S outputs"]:
        """The addition to each row's product with the matrix of its expert, in the dtype of A; `expert` ascends."""
        rows, place = rows.to(self.a.dtype), self.place[expert]
        mine = None
        if len(self.a) < len(self.place):
            mine = (place >= 0).nonzero().squeeze(1)
            rows_in, place = rows[mine], place[mine]
        else:
            rows_in = rows
        ids = torch.arange(len(self.a), device=rows.device)
        ends = torch.searchsorted(place, ids, right=True, out_int32=True)
        z = product(F.dropout(rows_in, self.dropout, self.training), self.a, ends)
        scale = self.scale.to(z.dtype)[place]
        halves = [
            product(part * scale, b, ends)
            for part, b in zip(
                z.chunk(self.parts, -1), self.b.chunk(self.parts, 1), strict=True
            )
        ]
        out = torch.cat(halves, -1)
        if mine is None:
            return out
        return out.new_zeros(len(rows), out.shape[-1]).index_copy(0, mine, out)

    def delta(self) -> Float[Tensor, "E outputs inputs"]:
        """s_e · B_e A_e of every matrix, 0 where none is added; in float32 at least."""
        dtype = wide(self.a.dtype)
        a, b, scale = (t.to(dtype) for t in (self.a, self.b, self.scale))
        pairs = zip(a.chunk(self.parts, 1), b.chunk(self.parts, 1), strict=True)
        whole = torch.cat([(b * scale[:, None]) @ a for a, b in pairs], 1)
        every = whole.new_zeros(len(self.place), *whole.shape[1:])
        return every.index_copy(0, (self.place >= 0).nonzero().squeeze(1), whole)


class LoRALinear(nn.Module):
    """A linear map with its LoRA; the map itself is frozen."""

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, dropout: float, rs: bool
    ) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora = LowRank(
            1, linear.in_features, linear.out_features, rank, alpha, dropout, rs
        ).to(linear.weight.device, wide(linear.weight.dtype))
        self.merged = False

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """W x + s · B A x, or the merged product, in the dtype of W x."""
        y = self.linear(x)
        if self.merged:
            return y
        rows = x.reshape(-1, x.shape[-1])
        first = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
        return (y + self.lora(rows, first).view_as(y)).to(y.dtype)


class LoRAExpertAdapter(nn.Module):
    """LoRA on a bank of stacked experts, or on a single one; their own weights are frozen.

        h = W_up,e x + s·B_up,e A_up,e x        y = W_down,e act(h) + s·B_down,e A_down,e act(h)

    The additions enter before the non-linearity, where they belong. At the start B = 0, so nothing changes.

    experts: `layers.Experts`, or one DenseFFN or SwiGLU (any module whose children are linear maps).
    rank: of all experts, or one for each; 0 leaves an expert alone.
    joint: gate and up projection share their A, as they do in PEFT where they are stored as one; else each has its own.

    Stands in for the experts in `layers.MoE`. `dispatch` counts once the adapters are merged; before, all experts are
    one grouped product. Raises ValueError on ranks that do not fit the experts, and where there is nothing to adapt.
    """

    def __init__(
        self,
        experts: nn.Module,
        rank: Ranks = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rs: bool = False,
        joint: bool = False,
    ) -> None:
        super().__init__()
        self.experts = experts.requires_grad_(False)
        self.up: LowRank | None = None
        self.merged = False
        if not isinstance(experts, Experts):
            if not isinstance(rank, int):
                raise ValueError(f"a single expert has one rank, got {rank}")
            _adapt_linear_maps(experts, rank, alpha, dropout, rs)
            return
        e, d, f = experts.num_experts, experts.width, experts.hidden
        parts = 2 if experts.activation in GATED and not joint else 1
        rows = experts.w_up.shape[1]
        self.up = LowRank(e, d, rows, rank, alpha, dropout, rs, parts)
        self.down = LowRank(e, f, d, rank, alpha, dropout, rs)
        for low_rank in (self.up, self.down):
            low_rank.to(experts.w_up.device, wide(experts.w_up.dtype))

    @property
    def num_experts(self) -> int:
        return cast("Experts", self.experts).num_experts

    def forward(
        self,
        x: Float[Tensor, "T D"],
        slots: Slots | None = None,
        dispatch: str = "grouped",
    ) -> Float[Tensor, "T D"]:
        """The weighted sum over each token's experts, as of `layers.Experts`; of a single expert its output."""
        bank = self.experts
        if self.up is None:
            return bank(x)
        if slots is None:
            raise ValueError("a bank of experts needs slots: which token goes to which")
        bank = cast("Experts", bank)
        if self.merged:
            return bank(x, slots, dispatch)
        ends = slot_ends(slots, bank.num_experts)
        rows = gather(x, slots)
        hidden = product(rows, bank.w_up, ends)
        hidden = (hidden + self.up(rows, slots.expert)).to(rows.dtype)
        if bank.b_up is not None:
            hidden = hidden + F.embedding(slots.expert, bank.b_up)
        inner = bank.activate(hidden)
        out = product(inner, bank.w_down, ends)
        out = (out + self.down(inner, slots.expert)).to(rows.dtype)
        if bank.b_down is not None:
            out = out + F.embedding(slots.expert, bank.b_down)
        return combine(out, slots, x)


def _adapt_linear_maps(
    module: nn.Module, rank: int, alpha: float, dropout: float, rs: bool
) -> None:
    linear = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
    if not linear:
        raise ValueError(f"{type(module).__name__} has no linear map to adapt")
    for name, child in linear.items():
        setattr(module, name, LoRALinear(child, rank, alpha, dropout, rs))


def apply_lora_to_moe(
    model: nn.Module,
    rank: Ranks = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    *,
    experts: bool = True,
    shared: bool = False,
    attention: bool = False,
    train_router: bool = False,
    rs: bool = False,
    joint: bool = False,
) -> nn.Module:
    """Put LoRA into every sparse layer of a model (or into one layer), in place; returns the model.

    Everything is frozen but what is asked for: the adapters of the routed `experts`, of the `shared` ones, of the
    linear maps of `attention`, and, as it is, the router (`train_router`). A list of ranks is for the routed experts;
    the rest then takes the largest. Raises ValueError where nothing is asked for, where the model has none of what is
    asked for, and where it has LoRA already: an adapter that is missed would train nothing, and say nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    blocks = [m for m in model.modules() if isinstance(m, DecoderBlock)]
    if not layers:
        raise ValueError(
            "there is no sparse layer (moe_course.layers.MoE) in the model"
        )
    if not (experts or shared or attention or train_router):
        raise ValueError(
            "nothing to train: ask for experts, shared, attention or train_router"
        )
    if shared and all(layer.shared is None for layer in layers):
        raise ValueError("there is no shared expert in the model")
    if attention and not blocks:
        raise ValueError(
            "there is no attention (moe_course.layers.DecoderBlock) in the model"
        )
    if any(isinstance(m, LowRank) for m in model.modules()):
        raise ValueError(
            "the model has LoRA already: ask for all parts at once, or merge and rebuild it"
        )
    model.requires_grad_(False)
    one = rank if isinstance(rank, int) else max(rank)
    for layer in layers:
        if experts:
            adapter = LoRAExpertAdapter(layer.experts, rank, alpha, dropout, rs, joint)
            layer.experts = cast("Experts", adapter)  # stands in for them
        if shared and layer.shared is not None:
            layer.shared = LoRAExpertAdapter(layer.shared, one, alpha, dropout, rs)
        if train_router:
            layer.router.requires_grad_(True)
    if attention:
        for block in blocks:
            _adapt_linear_maps(block.attention, one, alpha, dropout, rs)
    return model


def count_trainable_params(model: nn.Module) -> tuple[int, int]:
    """Numbers in all parameters, and in those that training changes, as (total, trainable)."""
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _adapted(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, list[tuple[Tensor, LowRank]]]]:
    """Each module that has LoRA, with its frozen weights [E, out, in] and what is added to them."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            yield module, [(module.linear.weight[None], module.lora)]
        elif isinstance(module, LoRAExpertAdapter) and module.up is not None:
            bank = cast("Experts", module.experts)
            yield module, [(bank.w_up, module.up), (bank.w_down, module.down)]


def merge(model: nn.Module) -> nn.Module:
    """Add every s·B A to its weight, in place: the same function to rounding, without cost. Twice is once.

    What is merged does not learn: its adapters have no gradient until `unmerge`.
    """
    return _change(model, merged=True)


def unmerge(model: nn.Module) -> nn.Module:
    """Take it out again: the weights as they were, to rounding."""
    return _change(model, merged=False)


@torch.no_grad()
def _change(model: nn.Module, merged: bool) -> nn.Module:
    for module, pairs in _adapted(model):
        if module.merged != merged:
            for weight, low_rank in pairs:
                # Added in float32 and rounded once, to what the weights are stored in.
                delta = low_rank.delta()
                weight.copy_(weight + delta if merged else weight - delta)
            module.merged = merged  # type: ignore[assignment]
    return model


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """All adapters by name: A and B, and what they mean, the scale s_e and the place of each expert's in the stack."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
        for part in ("a", "b", "scale", "place")
    }


def save_adapters(model: nn.Module, path: Path) -> None:
    """Write all adapters, and whatever else is trained, to a safetensors file."""
    from safetensors.torch import save_file

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tensors = adapter_weights(model) | trained
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path)


@torch.no_grad()
def load_adapters(model: nn.Module, path: Path) -> nn.Module:
    """Read what `save_adapters` wrote into a model that `apply_lora_to_moe` prepared alike.

    Raises ValueError where names, shapes, scales or the adapted experts differ, and while the model's own adapters are
    merged; nothing is changed then.
    """
    from safetensors.torch import load_file

    # Else unmerge would take out what was never put in.
    if any(module.merged for module, _ in _adapted(model)):
        raise ValueError("the model's adapters are merged: unmerge them first")
    read, adapters = load_file(path), adapter_weights(model)
    own = dict(model.named_parameters()) | adapters
    needed = set(adapters) | {n for n, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(needed - set(read)):
        raise ValueError(
            f"{path.name} lacks {missing[0]} ({len(missing)} missing): apply the same LoRA that was saved"
        )
    for name, tensor in read.items():
        if name not in own or own[name].shape != tensor.shape:
            found = list(own[name].shape) if name in own else "nothing of that name"
            raise ValueError(
                f"{path.name} holds {name} of shape {list(tensor.shape)}, but the model has {found}"
            )
    for name in adapters:
        meaning = name.endswith((".scale", ".place"))
        mine = adapters[name].cpu()
        if meaning and not torch.equal(read[name].to(mine.dtype), mine):
            raise ValueError(
                f"{path.name} holds another {name} than the model: the same numbers would mean something else"
            )
    for name, tensor in read.items():
        own[name].copy_(tensor)
    return model


def to_peft(
    low_rank: LowRank,
) -> tuple[Float[Tensor, "Er inputs"], Float[Tensor, "outputs rE"]]:
    """lora_A and lora_B as PEFT keeps them for a stacked parameter (`target_parameters`).

    In lora_A the expert is the slow index of the E·r rows, in lora_B the fast one of the r·E columns. Raises ValueError
    on what PEFT cannot hold there: an A of its own for each half, experts of different rank.
    """
    if low_rank.parts != 1:
        raise ValueError("PEFT shares A between gate and up projection: use joint=True")
    if not low_rank.scale.all() or len(low_rank.a) < len(low_rank.place):
        raise ValueError("PEFT gives all experts of a bank one rank")
    return low_rank.a.flatten(0, 1), low_rank.b.permute(1, 2, 0).flatten(1)


@torch.no_grad()
def from_peft(
    low_rank: LowRank,
    lora_a: Float[Tensor, "Er inputs"],
    lora_b: Float[Tensor, "outputs rE"],
) -> None:
    """Copy PEFT's lora_A and lora_B of a stacked parameter into a LowRank of the same sizes."""
    to_peft(low_rank)  # refuses what PEFT cannot hold
    e, rank = len(low_rank.a), low_rank.a.shape[1]
    low_rank.a.copy_(lora_a.unflatten(0, (e, rank)))
    low_rank.b.copy_(lora_b.unflatten(1, (rank, e)).permute(2, 0, 1))
