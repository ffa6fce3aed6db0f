"""Derived notebooks: same bytes on every run, stubs that only lack lines, refusals where something is missing."""

import json

import nbformat
import pytest

from moe_course.grading import derive as d
from moe_course.grading.core import exercise_numbers, load_exercise

CELL = "def f(x):\n    # Your code here.\n    # BEGIN SOLUTION\n    return x\n    # END SOLUTION\n"


def masters(root):
    return [
        root / "solutions" / f"{load_exercise(number).stem}.py"
        for number in exercise_numbers()
    ]


def test_same_bytes_every_time(root):
    for master in masters(root):
        assert d.derive(master, "") == d.derive(master, "")


def test_committed_files_are_in_sync(root):
    for path, text in d.all_files(root).items():
        assert path.read_text(encoding="utf-8") == text, path


def code_lines(text):
    cells = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    return ["".join(cell).splitlines() for cell in cells]


def test_solving_only_adds_lines(root):
    for master in masters(root):
        stubs, worked = (code_lines(text) for text in d.derive(master, ""))
        assert len(stubs) == len(worked)
        added = 0
        for stub, solved in zip(stubs, worked, strict=True):
            rest = iter(solved)
            assert all(line in rest for line in stub), (
                stub
            )  # a subsequence: in order, nothing lost
            added += len(solved) - len(stub)
        assert added >= len(load_exercise(master.name[:2]).questions)


def test_no_solution_in_the_exercise(root):
    for master in masters(root):
        exercise, worked = d.derive(master, "")
        assert "SOLUTION" not in exercise + worked
        assert "return" not in "\n".join(
            "\n".join(cell) for cell in code_lines(exercise)
        )


def test_markers():
    assert d.without_solution(CELL) == "def f(x):\n    # Your code here."
    assert d.with_solution(CELL) == "def f(x):\n    # Your code here.\n    return x"


@pytest.mark.parametrize(
    "text",
    ["# BEGIN SOLUTION\nx", "x\n# END SOLUTION", "# BEGIN SOLUTION\n# BEGIN SOLUTION"],
)
def test_unbalanced_markers_are_refused(text):
    with pytest.raises(ValueError, match="SOLUTION"):
        d.without_solution(text)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("{meta 01.3}", "", "01.3 needs a text"),
        ('tags=["01.3"]', "", "01.3 needs a text"),
        ("def gqa_params(", "def other(", "must define gqa_params"),
        (
            "    # BEGIN SOLUTION\n    queries_and_output",
            "    queries_and_output",
            "unbalanced",
        ),
        (
            "# BEGIN SOLUTION\n    weights",
            "#BEGIN SOLUTION\n    weights",
            "unbalanced",
        ),
        ("# Fill in", "# ### Begin solution\n# Fill in", "marker"),
        ('# %%\ncheck("01.1"', '# %% tags=["01.1"]\ncheck("01.1"', "two cells"),
        ("{meta 01.2}", "{meta 1.2}", "needs a text"),
        (
            "def matched_hidden(",
            "# def matched_hidden(\ndef other(",
            "must define matched_hidden",
        ),
    ],
)
def test_incomplete_masters_are_refused(root, tmp_path, old, new, complaint):
    text = (root / "solutions" / "01_concepts.py").read_text(encoding="utf-8")
    assert old in text
    master = tmp_path / "01_concepts.py"
    master.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        d.derive(master, "")


def test_question_without_a_solution_is_refused(root, tmp_path):
    text = (root / "solutions" / "01_concepts.py").read_text(encoding="utf-8")
    start = text.index("    # BEGIN SOLUTION\n    weights")
    end = text.index("    # END SOLUTION", start)
    master = tmp_path / "01_concepts.py"
    master.write_text(
        text[:start] + "    # BEGIN SOLUTION\n" + text[end:], encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"01\.1 has no solution"):
        d.derive(master, "")


def test_metadata_on_the_page_is_that_of_the_checks(root):
    exercise, _ = d.derive(root / "solutions" / "01_concepts.py", "")
    question = load_exercise("01").question("01.4")
    assert (
        f"*{question.points} points · difficulty ●●● · about {question.minutes} minutes*"
        in exercise
    )
    assert "{meta" not in exercise
    assert "{minutes}" not in exercise


def test_setup_cell_follows_the_address():
    compile(d.setup_cell(""), "setup", "exec")
    with_address = d.setup_cell("https://github.com/someone/course")
    assert "git+https://github.com/someone/course" in with_address
    assert "constraints" not in with_address


def test_citation_follows_the_address():
    cited = d.with_address("a: 1\n", "https://github.com/someone/course")
    assert 'repository-code: "https://github.com/someone/course"' in cited
    assert d.with_address(cited, "") == "a: 1\n"


def test_stray_outputs_are_named(tmp_path):
    output = nbformat.v4.new_output("stream", text="1\n")
    stray = nbformat.v4.new_code_cell("print(1)", outputs=[output], execution_count=1)
    golden = nbformat.v4.new_code_cell("print(1)", metadata={"tags": [d.GOLDEN]})
    nbformat.write(
        nbformat.v4.new_notebook(cells=[stray, golden]), tmp_path / "n.ipynb"
    )
    complaints = d.stray_outputs(tmp_path / "n.ipynb")
    assert len(complaints) == 3
    assert "stored outputs" in complaints[0]
    assert "no stored output" in complaints[2]


def test_a_solution_of_comments_is_none(root, tmp_path):
    text = (root / "solutions" / "01_concepts.py").read_text(encoding="utf-8")
    start = text.index("    weights = 3")
    end = text.index("    # END SOLUTION", start)
    master = tmp_path / "01_concepts.py"
    master.write_text(text[:start] + "    # 3 D F\n" + text[end:], encoding="utf-8")
    with pytest.raises(ValueError, match=r"01\.1 has no solution"):
        d.derive(master, "")


def test_drift_is_reported(root, tmp_path, monkeypatch, capsys):
    for name in ("solutions", "exercises", "book"):
        (tmp_path / name).mkdir()
    for name in ("solutions/01_concepts.py", "_config.yml", "CITATION.cff"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert d.main([]) == 0
    assert d.main(["--check"]) == 0
    path = tmp_path / "exercises" / "01_concepts.ipynb"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert d.main(["--check"]) == 1
    assert "01_concepts.ipynb has drifted" in capsys.readouterr().err
    path.rename(path.with_name("02_old.ipynb"))
    assert d.main([]) == 1
    assert "02_old.ipynb has no master" in capsys.readouterr().err
    (tmp_path / "solutions" / "01_concepts.py").write_text("# %%\n", encoding="utf-8")
    assert d.main(["--check"]) == 2
    assert "needs a text" in capsys.readouterr().err
