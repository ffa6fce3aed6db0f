"""The checks are themselves attacked: filed wrong answers fail where they must, right ones pass, cheats are seen."""

import functools
import importlib.util
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

from moe_course.grading import calls, core, notebook
from moe_course.grading.core import (
    Answer,
    Failure,
    Invariant,
    Question,
    exercise_numbers,
    grade,
    load_exercise,
)
from moe_course.grading.derive import with_solution

SEEDS = range(12)


def seeds(question):
    """Kernels take seconds under the interpreter, and what is trained takes longer."""
    return range(1) if question.slow else range(3) if question.needs else SEEDS


def checkable(number):
    """The questions that this machine can check."""
    return [q for q in load_exercise(number).questions if not q.lacking]


def filed(root, number):
    path = root / "tests" / "wrong_answers" / f"{load_exercise(number).stem}.py"
    spec = importlib.util.spec_from_file_location(f"filed_{number}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", exercise_numbers())
def test_every_question_has_its_answers_on_file(root, number):
    answers = filed(root, number)
    for question in load_exercise(number).questions:
        wrong, right = answers.WRONG[question.id], answers.RIGHT[question.id]
        assert len(wrong) >= 3, question.id
        assert sum(what == answers.PACKAGE for what, _, _ in wrong) == 1, question.id
        assert len(right) >= 2, question.id


@pytest.mark.parametrize("number", exercise_numbers())
def test_wrong_answers_fail_at_the_named_invariant(root, number):
    answers = filed(root, number).WRONG
    for question in checkable(number):
        for what, answer, name in answers[question.id]:
            for seed in seeds(question):
                outcome = grade(question, answer, seed)
                failed = [
                    line.name for line in outcome.lines if line.status == core.FAILED
                ]
                assert failed, f"{question.id}, {what}: passes with seed {seed}"
                assert failed[0] == name, (
                    f"{question.id}, {what}: fails at {failed[0]!r}"
                )
                assert outcome.points < question.points


@pytest.mark.parametrize("number", exercise_numbers())
def test_package_functions_earn_nothing(root, number):
    answers = filed(root, number)
    for question in checkable(number):
        wrong = answers.WRONG[question.id]
        (answer,) = [a for what, a, _ in wrong if what == answers.PACKAGE]
        outcome = grade(question, answer, 0)
        assert outcome.points == 0
        assert "calls the package" in outcome.lines[0].detail, question.id


@pytest.mark.parametrize("number", exercise_numbers())
def test_right_answers_pass(root, number):
    answers = filed(root, number).RIGHT
    for question in checkable(number):
        if question.slow:
            continue  # in a test of its own
        for answer in answers[question.id]:
            for seed in seeds(question):
                outcome = grade(question, answer, seed)
                assert outcome.full, f"{question.id}: {outcome.text()}"


def slow_answers(kind):
    """(what, question, answer, invariant that must fail) of the answers that take long."""
    root = Path(__file__).parents[1]
    for number in exercise_numbers():
        answers = filed(root, number)
        for question in load_exercise(number).questions:
            if not question.slow:
                continue
            if kind == "right":
                cases = [
                    (f"design {i}", a, "")
                    for i, a in enumerate(answers.RIGHT[question.id])
                ]
            else:
                cases = answers.SLOW_WRONG[question.id]
            for what, answer, name in cases:
                yield pytest.param(question, answer, name, id=f"{question.id}-{what}")


@pytest.mark.thorough
@pytest.mark.parametrize(("question", "answer", "name"), [*slow_answers("right")])
def test_slow_right_answers_pass(question, answer, name):
    for seed in range(2):
        outcome = grade(question, answer, seed)
        assert outcome.full, outcome.text()


@pytest.mark.thorough
@pytest.mark.parametrize(("question", "answer", "name"), [*slow_answers("wrong")])
def test_slow_wrong_answers_fail_at_the_named_invariant(question, answer, name):
    outcome = grade(question, answer, 0)
    failed = [line.name for line in outcome.lines if line.status == core.FAILED]
    assert failed[:1] == [name], outcome.text()


@pytest.mark.parametrize("number", exercise_numbers())
def test_every_question_can_be_checked_here(number):
    for question in load_exercise(number).questions:
        if question.lacking:
            pytest.skip(f"{question.id}: {question.lacking}")


def names_of(path):
    """Run a notebook's imports and definitions in this process."""
    names = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and (
            "def " in cell.source or "import" in cell.source
        ):
            exec(cell.source, names)
    return names


def worked_names(root, number):
    return names_of(root / "solutions" / f"{load_exercise(number).stem}.ipynb")


@pytest.mark.parametrize("number", exercise_numbers())
def test_solution_scores_full_and_stub_nothing(root, number):
    exercise = load_exercise(number)
    outcomes = notebook.grade_all(number, worked_names(root, number), 0)
    assert sum(o.points for o in outcomes) == sum(q.points for q in checkable(number))
    stubs = names_of(root / "exercises" / f"{exercise.stem}.ipynb")
    outcomes = notebook.grade_all(number, stubs, 0)
    assert [o.points for o in outcomes] == [0] * len(outcomes)
    assert not any(o.attempted for o in outcomes)


@pytest.mark.parametrize(
    ("number", "points", "most"),
    [
        ("01", 20, 7),
        ("02", 25, 8),
        ("03", 25, 8),
        ("04", 25, 7),
        ("05", 25, 6),
        ("06", 25, 7),
        ("07", 30, 5),
    ],
)
def test_exercises_are_as_announced(number, points, most):
    exercise = load_exercise(number)
    assert exercise.points == points
    assert 5 <= len(exercise.questions) <= most


@pytest.mark.parametrize("stem", ["01_concepts"])
def test_one_broken_answer_fails_nbval(root, tmp_path, stem):
    broken = nbformat.read(root / "solutions" / f"{stem}.ipynb", as_version=4)
    (cell,) = [c for c in broken.cells if "01.3" in c.metadata.get("tags", ())]
    assert "queries_and_output + keys_and_values" in cell.source
    cell.source = cell.source.replace(
        "queries_and_output + keys_and_values", "queries_and_output"
    )
    nbformat.write(broken, tmp_path / "broken.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--nbval-lax",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "broken.ipynb")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "the solutions must earn full marks" in done.stdout


def one_question(test, *more):
    invariants = [Invariant("first", 2, test, "hint one"), *more]
    return Question("09.1", "t", "f", 1, 1, "page", tuple(invariants))


def count_to_three(answer, rng):
    core.expect_count(answer, [{"n": 3}, {"n": 1}], lambda n: n)


def test_first_invariant_gates_the_others():
    free = Invariant("free", 5, lambda answer, rng: None, "hint")
    outcome = grade(one_question(count_to_three, free), lambda n: 7)
    assert outcome.points == 0
    assert [line.status for line in outcome.lines] == [core.FAILED, core.NOT_REACHED]
    assert grade(one_question(count_to_three, free), lambda n: n).points == 7


def test_smallest_failing_case_is_shown():
    outcome = grade(one_question(count_to_three), lambda n: 7)
    assert "n=1" in outcome.lines[0].detail
    assert "expected 1, got 7" in outcome.lines[0].detail


@pytest.mark.parametrize(
    "answer",
    [lambda n: float(n), lambda n: n == 3 or n, lambda n: type("I", (int,), {})(n)],
)
def test_lookalikes_of_an_integer_do_not_pass(answer):
    assert not grade(one_question(count_to_three), answer).full


def test_an_object_that_equals_everything_does_not_pass():
    class Equal:
        def __eq__(self, other):
            return True

        __hash__ = None

    assert not grade(one_question(count_to_three), lambda n: Equal()).full
    outcome = grade(
        load_exercise("01").question("01.5"), lambda **case: (Equal(), Equal()), 0
    )
    assert outcome.points == 0
    assert (
        grade(load_exercise("01").question("01.7"), lambda question: Equal(), 0).points
        == 0
    )


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (lambda n: float(n), "use // instead of /"),
        (lambda n: Fraction(n), "as Fraction; return a plain int"),
        (lambda n: 10**5000, "<int>"),
        (lambda n: "x" * 10**6, "xxx..."),
        (lambda n: None if n > 1 else n, "is a `return` missing on some path?"),
        (lambda wrong: wrong, "unexpected keyword argument"),
    ],
)
def test_what_is_amiss_is_said_instead_of_the_usual_hint(answer, advice):
    line = grade(one_question(count_to_three), answer).lines[0]
    assert line.status == core.FAILED
    assert advice in line.detail
    assert len(line.detail) < 1000


def test_a_named_pair_is_a_pair_and_a_list_is_told_so():
    class Pair(NamedTuple):
        total: int
        active: int

    question = load_exercise("01").question("01.5")
    solved = worked_names(Path(__file__).parents[1], "01")["moe_params"]
    assert grade(question, lambda **case: Pair(*solved(**case)), 0).full
    outcome = grade(question, lambda **case: list(solved(**case)), 0)
    assert "a list; return a tuple" in outcome.lines[0].detail


def test_an_answer_that_breaks_the_comparison_fails_its_question_alone():
    class Broken:
        def __repr__(self):
            raise ValueError("no text")

        def __eq__(self, other):
            raise ValueError("no equality")

        __hash__ = None

    outcome = grade(one_question(count_to_three), lambda n: Broken())
    assert outcome.points == 0
    assert "<Broken>" in outcome.lines[0].detail


def test_mutating_an_argument_is_seen():
    def test(answer, rng):
        answer([1, 2])

    def mutates(values):
        values.append(3)
        return 1

    assert "changed its arguments" in grade(one_question(test), mutates).lines[0].detail


def test_the_hint_is_left_out_where_it_does_not_apply():
    assert grade(one_question(count_to_three), lambda n: 7).lines[0].hint == "hint one"
    for answer in (float, Fraction, lambda n: 1 / 0, lambda wrong: wrong):
        assert grade(one_question(count_to_three), answer).lines[0].hint == ""


def test_own_failing_line_is_shown():
    def answer(n):
        return n / 0  # the learner's line

    detail = grade(one_question(count_to_three), answer).lines[0].detail
    assert "ZeroDivisionError" in detail
    assert "return n / 0" in detail


def test_use_of_the_package_is_seen_through_a_try():
    from moe_course.specs import FFN

    def sly(n):
        try:
            return FFN(1).params(n) * 0 + n
        except Exception:
            return n

    assert (
        "calls the package" in grade(one_question(count_to_three), sly).lines[0].detail
    )


def test_the_profile_hook_is_put_back():
    hook = sys.getprofile()
    grade(one_question(count_to_three), lambda n: 1 / 0)
    assert sys.getprofile() is hook


@pytest.mark.parametrize("answer", [None, 5, "f"])
def test_no_function_is_no_attempt(answer):
    outcome = grade(one_question(count_to_three), answer)
    assert outcome.points == 0
    assert not outcome.attempted
    advice = "run the cell" if answer is None else "pass the function itself"
    assert advice in outcome.lines[0].detail


def test_same_seed_same_cases():
    def draw(seed):
        cases = []

        def test(answer, rng):
            cases.append(rng.random())

        grade(one_question(test), lambda: None, seed)
        return cases

    assert draw(3) == draw(3) != draw(4)


def test_exit_in_an_answer_is_a_failure_not_an_end():
    def leaves(n):
        raise SystemExit(0)

    assert grade(one_question(count_to_three), leaves).points == 0


def test_question_without_hint_is_refused():
    with pytest.raises(ValueError, match="hint"):
        one_question(count_to_three, Invariant("x", 1, count_to_three, ""))


def test_unknown_exercise_and_question_are_named():
    with pytest.raises(ValueError, match="99"):
        load_exercise("99")
    with pytest.raises(ValueError, match=r"01\.9"):
        load_exercise("01").question("01.9")


def test_check_offers_the_solution_after_two_different_attempts(
    root, capsys, monkeypatch
):
    monkeypatch.setattr(notebook, "_attempts", {})
    monkeypatch.chdir(root / "exercises")
    notebook.solution("01.1")
    assert "2 more attempts" in capsys.readouterr().out
    for attempt in (
        lambda width, hidden, bias=False: width,
        lambda width, hidden, bias=False: hidden,
    ):
        notebook.check("01.1", attempt, seed=0)
        notebook.check(
            "01.1", attempt, seed=0
        )  # the same code again is no second attempt
        if attempt(1, 2) == 1:
            notebook.solution("01.1")
            assert "1 more attempt of" in capsys.readouterr().out
    notebook.solution("01.1")
    shown = capsys.readouterr().out.split("shows a worked answer.\n")[-1]
    assert "3 * width * hidden" in shown
    assert "SOLUTION" not in shown


def test_attempts_are_told_apart_through_decorators_and_partials():
    def logged(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            return function(*args, **kwargs)

        return inner

    one, two = logged(lambda n: n + 1), logged(lambda n: n * 2)
    assert notebook._fingerprint(one) != notebook._fingerprint(two)
    base = lambda n, m: n  # noqa: E731
    first, again = functools.partial(base, m=1), functools.partial(base, m=1)
    assert notebook._fingerprint(first) == notebook._fingerprint(again)


def test_a_stub_is_no_attempt(capsys, monkeypatch):
    monkeypatch.setattr(notebook, "_attempts", {})
    notebook.check("01.1", lambda width, hidden, bias=False: None)
    assert "returned None: fill in the cell" in capsys.readouterr().out
    assert notebook._attempts == {}


def test_solution_without_the_solutions_folder(monkeypatch, capsys):
    monkeypatch.setattr(notebook, "_attempts", {"01.1": {1, 2}})
    monkeypatch.setattr(notebook, "find_upwards", lambda relative: None)
    notebook.solution("01.1")
    assert "without solutions" in capsys.readouterr().out


def test_total_needs_full_marks(root, capsys, monkeypatch):
    names = worked_names(root, "01")
    monkeypatch.setattr(notebook, "_notebook_names", lambda: names)
    assert notebook.total("01") is True
    assert "20 of 20" in capsys.readouterr().out
    names["gqa_params"] = lambda *args, **kwargs: 0
    assert notebook.total("01") is False
    assert "Next: 01.3 gqa_params" in capsys.readouterr().out


def test_answer_counts_only_real_results():
    answer = Answer(lambda n: None)
    answer(1)
    assert (answer.calls, answer.empty) == (1, 1)
    with pytest.raises(Failure):
        Answer(lambda: 1 / 0)()


def test_worked_answers_of_the_master_are_those_of_the_notebook(root):
    master = root / "solutions" / "01_concepts.py"
    for question in load_exercise("01").questions:
        text = notebook.worked_answer(question.id, master)
        assert f"def {question.answer}(" in text
        assert text == with_solution(text)


@pytest.mark.parametrize(
    ("slip", "says"),
    [
        ("twice", "a second softmax"),
        ("mean", "do not average"),
        ("soft_counts", "f counts assignments"),
        ("always_divide", "the other convention"),
    ],
)
def test_a_mistake_that_others_have_shipped_is_named(root, slip, says):
    switch = filed(root, "03").switch
    question = load_exercise("03").question("03.1")
    for seed in SEEDS:
        outcome = grade(question, functools.partial(switch, **{slip: True}), seed)
        assert says in outcome.lines[0].detail, outcome.text()


@pytest.mark.parametrize(
    ("number", "what", "says"),
    [
        ("04.1", "GiB/s", "a data sheet's GB are 10^9 bytes"),
        ("04.1", "both times added up", "within a kernel they overlap"),
        ("04.2", "draws with repetition", "a token's k experts differ"),
        ("04.2", "B·k", "tokens share experts"),
        ("04.2", "in float32", "compute in float64"),
        ("04.3", "all stored experts", "read those that some token has"),
        ("04.4", "query heads", "only key-value heads are cached"),
        ("04.4", "no factor 2", "without the factor 2"),
        ("04.4", "GiB devices", "with GiB for the GB of the device"),
        ("04.4", "weights in bits", "bits for bytes in the weights"),
        ("04.5", "two's complement", "here 8 is added"),
        ("04.5", "the first in the low half", "here it is in the high one"),
        ("04.5", "scales of 32 bits", "they are stored in 16"),
        ("04.6", "one row a choice", "goes there once"),
        ("04.6", "what stays leaves", "counts what stays on the rank"),
    ],
)
def test_usual_mistakes_with_bytes_are_named(root, number, what, says):
    (answer,) = [a for w, a, _ in filed(root, "04").WRONG[number] if w == what]
    question, named = load_exercise("04").question(number), 0
    for seed in SEEDS:
        outcome = grade(question, answer, seed)
        found = [line.detail for line in outcome.lines if line.status == core.FAILED]
        named += says in found[0]
    # On some cases several mistakes come to the same.
    assert named > len(SEEDS) / 2


def test_where_triton_is_missing_its_questions_are_left_out(root, monkeypatch, capsys):
    names = worked_names(root, "05")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(notebook, "_notebook_names", lambda: names)
    exercise = load_exercise("05")
    kernels = [q for q in exercise.questions if q.needs]
    assert [q.id for q in kernels] == ["05.4", "05.5", "05.6"]
    for question in exercise.questions:
        outcome = grade(question, names[question.answer], 0)
        assert outcome.full
        assert (outcome.points, outcome.out_of) == (
            (0, 0) if question.needs else (question.points, question.points)
        )
    # Neither missing answers nor wrong ones change that.
    for answer in (None, lambda h: 3):
        assert grade(kernels[0], answer).out_of == 0
    notebook.check("05.4", names["swiglu"])
    said = capsys.readouterr().out
    assert said.startswith("05.4 swiglu: Triton is not installed here")
    assert len(said.splitlines()) == 1
    assert notebook.total("05") is True
    said = capsys.readouterr().out
    assert "10 of 10  in all" in said
    assert said.count("Triton is not installed") == 1
    names["tile_map"] = lambda offsets, block: offsets
    assert notebook.total("05") is False
    assert "6 of 10  in all" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["solutions", "exercises"])
def test_the_kernel_notebook_runs_without_triton(root, kind):
    code = f"""
import sys
sys.modules["triton"] = None
import json
for cell in json.load(open({str(root / kind / "05_kernels.ipynb")!r}))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the questions that need it are left out" in done.stdout
    points = 10 if kind == "solutions" else 0
    assert f"{points} of 10  in all" in done.stdout.replace("   0", "0")


def test_a_text_that_a_check_returns_is_shown_where_it_passes():
    def test(answer, rng):
        answer(n=1)
        return "3 programs"

    outcome = grade(one_question(test), lambda n: n)
    assert outcome.full
    assert "  ✓ first\n      3 programs" in outcome.text()


def test_where_memory_is_refused_the_far_experts_are_said_to_be_unchecked(
    root, monkeypatch
):
    question = load_exercise("05").question("05.5")
    if question.lacking:
        pytest.skip(question.lacking)

    def refused(tensor, stride):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(calls, "spread", refused)
    outcome = grade(question, worked_names(root, "05")["grouped_gemm"], 0)
    assert outcome.full
    assert "not checked: offsets past 2^31" in outcome.text()
