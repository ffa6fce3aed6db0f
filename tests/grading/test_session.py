"""Functions, modules and gradients across the boundary are as they would be here."""

from __future__ import annotations

import gc

import pytest
import torch

from moe_course.grading import judge, sandbox, session, wire
from moe_course.grading.core import Exercise, Failure, Invariant, Question, RemoteError
from moe_course.grading.sandbox import Limits, Sandbox
from moe_course.grading.session import Remote, RemoteModule, Session

LIMITS = Limits(call_seconds=10)

CELL = """
import torch
from torch import nn

class Experts(nn.Module):
    def __init__(self, width, experts):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        def made(*shape):
            return nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64))
        self.gate = nn.Linear(width, experts, bias=False, dtype=torch.float64)
        self.gate.weight = made(experts, width)
        self.blocks = nn.ParameterList(made(width, width) for _ in range(experts))
        self.frozen = nn.Parameter(torch.ones(width, dtype=torch.float64), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, scale=1.0):
        self.calls += 1
        gates = self.gate(x).softmax(-1)
        if self.training:
            gates = gates * 2
        parts = torch.stack([x @ block for block in self.blocks], dim=-2)
        return scale * self.frozen * (gates.unsqueeze(-1) * parts).sum(-2), gates

def through(f, x, w):
    return f(x * 2, w) + x

def twice(module, x):
    return module(module(x)[0])[0]

def composed(functions, x):
    for function in functions:
        x = function(x)
    return x

def adder(n):
    return lambda x: x + n

def held():
    import gc
    return [len(o.graphs) for o in gc.get_objects() if type(o).__name__ == "Worker"]

def grad_mode():
    return torch.is_grad_enabled()

def inner_gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]

class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.w = nn.Parameter(torch.ones(3))
        if kind == "hidden":
            self._parameters["forward"] = nn.Parameter(torch.ones(3))
        if kind == "dunder":
            self._parameters["__class__"] = nn.Parameter(torch.ones(3))
        if kind == "taken":
            self._parameters["session"] = nn.Parameter(torch.ones(3))
        if kind == "lists":
            self.named_parameters = lambda: [("w", nn.Parameter(torch.ones(3).to_sparse()))]

    def forward(self, x):
        if self.kind == "shape":
            self.w = nn.Parameter(torch.ones(4))
        if self.kind == "gains":
            self.v = nn.Parameter(torch.ones(4))
        if self.kind == "raises":
            raise ValueError("no such width")
        if self.kind == "hangs":
            while True:
                pass
        return x * self.w if self.kind in ("fine", "gains") else x
"""


@pytest.fixture(scope="module")
def remote():
    reason = sandbox.why_not()
    if reason is not None:
        pytest.skip(f"no sandbox here: {reason}")
    one = Session([CELL], lambda: Sandbox(LIMITS), LIMITS)
    one.end += 3600
    yield one
    assert not one.troubles
    one.close()


@pytest.fixture(autouse=True)
def _found_again(remote):
    remote.lost = ""


@pytest.fixture(scope="module")
def here():
    names: dict = {"__name__": "submission"}
    exec(CELL, names)
    return names


def pair(remote, here, width=4, experts=3):
    return Remote(remote, "Experts")(width, experts), here["Experts"](width, experts)


def random(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def test_a_module_has_the_same_parameters_and_buffers(remote, here):
    there, local = pair(remote, here)
    assert isinstance(there, torch.nn.Module)
    assert [n for n, _ in there.named_parameters()] == [
        n for n, _ in local.named_parameters()
    ]
    for (_, a), (_, b) in zip(
        there.named_parameters(), local.named_parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    assert there.state_dict().keys() == local.state_dict().keys()
    assert torch.equal(there.gate.weight, local.gate.weight)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_values_and_gradients_of_a_module_are_those_of_a_local_one(
    remote, here, mode, tokens
):
    torch.manual_seed(tokens)
    there, local = pair(remote, here)
    getattr(there, mode)()
    getattr(local, mode)()
    x = random(tokens, 4, grad=True)
    y = x.detach().clone().requires_grad_()
    weights = random(tokens, 4), random(tokens, 3)
    for module, inputs in ((there, x), (local, y)):
        out, gates = module(inputs, scale=3.0)
        ((out * weights[0]).sum() + (gates * weights[1]).sum()).backward()
    assert torch.equal(there(x)[0], local(y)[0])
    assert torch.equal(x.grad, y.grad)
    for (name, a), (_, b) in zip(
        there.named_parameters(), local.named_parameters(), strict=True
    ):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    assert there.calls == local.calls == 2


def test_training_here_trains_there(remote, here):
    torch.manual_seed(1)
    there, local = pair(remote, here)
    x, want = random(16, 4), random(16, 4)
    gc.collect()
    gc.disable()  # nothing waits for it
    (before,) = Remote(remote, "held")()
    losses = []
    for module in (there, local):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(30):
            optimizer.zero_grad()
            loss = (module(x)[0] - want).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:30] == losses[30:]
    assert losses[29] < losses[0] / 2
    (after,) = Remote(remote, "held")()
    gc.enable()
    assert after <= before + 1  # and not one more for each step


def test_parameters_set_here_are_used_there(remote, here):
    there, local = pair(remote, here)
    other = {n: torch.randn_like(p) for n, p in local.named_parameters()}
    for module in (there, local):
        module.load_state_dict(other, strict=False)
    x = random(3, 4)
    assert torch.equal(there(x)[0], local(x)[0])
    there.gate.weight.requires_grad_(False)
    out, _ = there(random(3, 4, grad=True))
    out.sum().backward()
    assert there.gate.weight.grad is None
    assert there.blocks.get_parameter("0").grad is not None


def test_an_old_graph_sees_the_parameters_it_was_made_with(remote, here):
    """As here: autograd refuses a gradient through a parameter that was written to since."""
    for module in pair(remote, here):
        x = random(3, 4, grad=True)
        out, _ = module(x)
        module(x)  # another call changes nothing
        out.sum().backward(retain_graph=True)
        with torch.no_grad():
            module.get_parameter("blocks.0").add_(1)
        module(x)
        with pytest.raises((RuntimeError, RemoteError), match="inplace operation"):
            out.sum().backward()


def test_a_module_and_functions_can_be_handed_back(remote, here):
    there, local = pair(remote, here)
    x = random(3, 4, grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = Remote(remote, "twice")(there, x), here["twice"](local, y)
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(there.gate.weight.grad, local.gate.weight.grad)
    assert there.calls == local.calls
    functions = [Remote(remote, "adder")(1), Remote(remote, "adder")(10), lambda x: -x]
    assert Remote(remote, "composed")(functions, 5) == -16


def test_gradients_flow_through_functions_handed_over(remote, here):
    torch.manual_seed(2)
    found = []
    own = random(4, grad=True)
    for function in (Remote(remote, "through"), here["through"]):
        x, w = random(3, 4).requires_grad_(), random(4, 4).requires_grad_()
        with torch.no_grad():
            x.fill_(0.5), w.fill_(0.25)
        own.grad = None
        out = function(lambda a, b: (a @ b).tanh() * own, x, w)
        (out * torch.arange(12.0, dtype=torch.float64).reshape(3, 4)).sum().backward()
        found.append((out.detach(), x.grad, w.grad, own.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_gradients_taken_inside_flow_through_functions_handed_over(remote):
    x = random(5)
    got = Remote(remote, "inner_gradient")(lambda a: a.square() * 3, x)
    assert torch.allclose(got, 6 * x)


def test_autograd_is_off_there_where_it_is_off_here(remote):
    assert Remote(remote, "grad_mode")()
    with torch.no_grad():
        assert not Remote(remote, "grad_mode")()


@pytest.mark.parametrize("kind", ["hidden", "dunder", "taken", "lists"])
def test_a_module_that_would_take_the_place_of_something_is_refused(remote, kind):
    with pytest.raises(RemoteError, match="module"):
        Remote(remote, "Odd")(kind)
    assert "module" in remote.lost


@pytest.mark.parametrize("kind", ["shape", "gains"])
def test_a_module_that_becomes_another_is_refused(remote, kind):
    module = Remote(remote, "Odd")(kind)
    with pytest.raises(RemoteError, match="module"):
        module(torch.ones(3))
    assert remote.lost


def test_a_module_that_raises_shows_its_line(remote):
    module = Remote(remote, "Odd")("raises")
    with pytest.raises(RemoteError, match=r"ValueError: no such width\n.*line"):
        module(torch.ones(3))
    assert not remote.lost


def test_what_a_lost_worker_made_is_gone(remote):
    module = Remote(remote, "Odd")("fine")
    assert torch.equal(module(torch.ones(3)), torch.ones(3))
    hanging = Remote(remote, "Odd")("hangs")
    remote.limits, before = Limits(call_seconds=1), remote.limits
    try:
        with pytest.raises(RemoteError, match="ran longer"):
            hanging(torch.ones(3))
    finally:
        remote.limits = before
    assert remote.lost
    with pytest.raises(RemoteError, match="ran longer"):
        module(torch.ones(3))
    remote.lost = ""
    with pytest.raises(RemoteError, match="has gone"):
        module(torch.ones(3))
    assert Remote(remote, "grad_mode")()  # the next question


@pytest.mark.parametrize(
    "state",
    [
        3,
        {"w": torch.ones(3)},
        {1: (torch.ones(3), True)},
        {"w": (torch.ones(3), 1)},
        {"w": (torch.ones(3, dtype=torch.int64), True)},
        {"w": ([1.0], True)},
        {"a b": (torch.ones(3), True)},
        {"": (torch.ones(3), True)},
        {"a.": (torch.ones(3), True)},
        {"a..b": (torch.ones(3), True)},
        {"_parameters": (torch.ones(3), True)},
        {"w": (torch.ones(3), True), "w.v": (torch.ones(3), True)},
        {"w.v": (torch.ones(3), True), "w": (torch.ones(3), True)},
    ],
    ids=str,
)
def test_nonsense_is_no_module(state):
    with pytest.raises(wire.WireError):
        RemoteModule(None, 1, "M", state)  # type: ignore[arg-type]


def test_graphs_of_callbacks_are_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(session, "MOST_HELD", 1000)
    one = Session([], lambda: pytest.fail("no worker is needed"), LIMITS)
    for number in range(50):
        x = torch.ones(10, requires_grad=True)
        one._hold(number, [x], [x * 2])
        assert len(one.graphs) <= 12  # 80 bytes each
    assert list(one.graphs) == list(range(38, 50))
    with pytest.raises(RuntimeError, match="no longer kept"):
        one._back({"graph": 3}, memoryview(b""))


def _trains(answer, rng):
    module = answer("fine")
    if not torch.equal(module(torch.full((3,), 2.0)), torch.full((3,), 2.0)):
        raise Failure("twice one is two")
    module(torch.ones(3)).sum().backward()
    if not torch.equal(module.w.grad, torch.ones(3)):
        raise Failure("the gradient of w is x")


def _calls(kind):
    def test(answer, rng):
        answer(kind)(torch.ones(3))

    return test


@pytest.mark.parametrize(
    ("test", "status", "points", "says"),
    [
        (_trains, "graded", 1, ""),
        (_calls("raises"), "graded", 0, "ValueError: no such width"),
        (_calls("hangs"), "needs-review", 0, "ran longer"),
        (_calls("shape"), "needs-review", 0, "sent a module"),
    ],
    ids=["right", "raises", "hangs", "changes"],
)
@pytest.mark.usefixtures("remote")
def test_a_question_whose_answer_is_a_module(monkeypatch, test, status, points, says):
    invariant = Invariant("works", 1, test, "hint")
    question = Question("09.1", "A module", "Odd", 1, 1, "x", (invariant,))
    exercise = Exercise("09", "modules", "Modules", (question,), "")
    monkeypatch.setattr(judge, "load_exercise", lambda _: exercise)
    limits = Limits(call_seconds=3)
    result = judge.judge([CELL], "09", lambda: Sandbox(limits), limits=limits)
    (verdict,) = result.verdicts
    assert (verdict.status, verdict.points) == (status, points), verdict
    assert says in verdict.reason
