"""DenseFFN and SwiGLU against sums written out in float64, and against production classes."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_course.layers import DenseFFN, SwiGLU
from moe_course.specs import FFN

SHAPES = [
    (1,),
    (0,),
    (5,),
    (2, 3),
    (2, 0, 3),
    (),
]  # of the tokens, before the model width
SIZES = st.integers(1, 9)


def _sigmoid(z):
    return 1 / (1 + torch.exp(-z))


ACT = {
    "relu": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
}


def _linear(layer: nn.Linear, x):
    y = torch.einsum("fd,...d->...f", layer.weight, x)
    return y if layer.bias is None else y + layer.bias


def _input(shape, width, dtype=torch.float64):
    return 3 * torch.randn(*shape, width, dtype=dtype)


@given(
    st.sampled_from(SHAPES),
    SIZES,
    SIZES,
    st.sampled_from(["relu", "gelu"]),
    st.booleans(),
)
def test_dense_ffn_equals_its_formula(shape, width, hidden, activation, bias):
    torch.manual_seed(width * 100 + hidden)
    layer = DenseFFN(width, hidden, activation, bias).double()
    x = _input(shape, width)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(
        y, _linear(layer.down, ACT[activation](_linear(layer.up, x)))
    )


@given(st.sampled_from(SHAPES), SIZES, SIZES, st.booleans())
def test_swiglu_equals_its_formula(shape, width, hidden, bias):
    torch.manual_seed(width * 100 + hidden)
    layer = SwiGLU(width, hidden, bias).double()
    x = _input(shape, width)
    y = layer(x)
    assert y.shape == x.shape
    gate = _linear(layer.gate, x)
    torch.testing.assert_close(
        y, _linear(layer.down, gate * _sigmoid(gate) * _linear(layer.up, x))
    )


LAYERS = [
    lambda w, h, bias: DenseFFN(w, h, "relu", bias),
    lambda w, h, bias: DenseFFN(w, h, "gelu", bias),
    SwiGLU,
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", LAYERS, ids=["relu", "gelu", "swiglu"])
def test_gradients_are_those_of_the_forward_pass(make, bias):
    torch.manual_seed(0)
    layer = make(3, 4, bias).double()
    names = list(dict(layer.named_parameters()))

    def run(x, *weights):
        return torch.func.functional_call(
            layer, dict(zip(names, weights, strict=True)), x
        )

    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (_input((2,), 3).requires_grad_(), *weights))


@given(SIZES, SIZES, st.booleans())
def test_parameters_are_those_that_specs_count(width, hidden, bias):
    def count(layer):
        return sum(p.numel() for p in layer.parameters())

    assert count(SwiGLU(width, hidden, bias)) == FFN(
        hidden, gated=True, bias=bias
    ).params(width)
    assert count(DenseFFN(width, hidden, "gelu", bias)) == FFN(
        hidden, gated=False, bias=bias
    ).params(width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", LAYERS, ids=["relu", "gelu", "swiglu"])
def test_dtype_is_kept(make, dtype):
    assert make(4, 8, True).to(dtype)(_input((3,), 4, dtype)).dtype == dtype


@pytest.mark.parametrize("activation", ["silu", "swish", "", "GELU"])
def test_an_unknown_activation_is_named(activation, unchecked_shapes):
    with pytest.raises(
        ValueError, match=f"activation must be one of relu, gelu, got {activation!r}"
    ):
        DenseFFN(4, 8, activation)


def test_shape_annotations_are_enforced_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        SwiGLU(4, 8)(torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_equals_the_block_that_production_models_run(family, bias):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, mlp_bias=bias)
    module = getattr(transformers.models, family.lower())
    theirs = getattr(getattr(module, f"modeling_{family.lower()}"), f"{family}MLP")(
        config
    )
    ours = SwiGLU(12, 20, bias=theirs.gate_proj.bias is not None)
    assert (ours.gate.bias is not None) == (
        bias and family == "Llama"
    )  # Qwen3 has no such key
    ours.load_state_dict(
        {key.replace("_proj", ""): value for key, value in theirs.state_dict().items()}
    )
    x = torch.randn(3, 5, 12)
    assert torch.equal(ours(x), theirs(x))
