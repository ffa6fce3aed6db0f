"""The published scores: every row says what was measured, how, and where that can be read."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from moe_course.specs import zoo

READ = {  # how a value was taken from its source
    "file in the repository",
    "report in the repository",
    "transcription of the paper",
    "copy of the page",
}
PROTOCOL = re.compile(r"\d+-shot(, .+)?|(.+, )?shots not stated")
# arXiv number and table or section, a file of a repository and its place, a page and its table
SOURCE = re.compile(
    r"arXiv:\d{4}\.\d{5}, (Table|section) .+"
    r"|[\w.-]+/[\w.-]+ [\w./-]+\.(md|pdf), .+"
    r"|[\w.-]+\.com/\S+, Table .+"
)


def read(root: Path, name: str) -> list[dict[str, str]]:
    with (root / "moe_course" / "data" / name).open(
        encoding="utf-8", newline=""
    ) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scores(root: Path) -> list[dict[str, str]]:
    return read(root, "published_quality.csv")


@pytest.fixture(scope="module")
def tokens(root: Path) -> list[dict[str, str]]:
    return read(root, "published_tokens.csv")


@pytest.fixture(scope="module")
def page(root: Path) -> Any:
    """The chapter's own names, after its cells that compute (the figures aside)."""
    path = root / "book" / "choosing" / "quality.ipynb"
    names: dict[str, Any] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "plots" not in cell.source:
            if "drawn" in cell.source:  # needs the figures
                continue
            exec(cell.source, names)
    return names


def test_every_score_is_complete(scores: list[dict[str, str]]) -> None:
    for row in scores:
        assert all(row.values()), row
        assert row["variant"] in {"base", "instruct"}, row
        assert PROTOCOL.fullmatch(row["protocol"]), row
        assert SOURCE.fullmatch(row["source"]), row
        assert row["read"] in READ, row
        assert 0 < float(row["value"]) <= 100, row


def test_every_token_count_is_complete(tokens: list[dict[str, str]]) -> None:
    for row in tokens:
        assert all(row.values()), row
        assert SOURCE.fullmatch(row["source"]), row
        assert row["read"] in READ, row
        assert 0.1 < float(row["trillions"]) < 100, row
    models = [row["model"] for row in tokens]
    assert models == sorted(set(models))


def test_a_score_stands_once(scores: list[dict[str, str]]) -> None:
    keys = [
        tuple(value for name, value in row.items() if name not in {"value", "read"})
        for row in scores
    ]
    assert len(keys) == len(set(keys))


def test_a_variant_is_not_another_ones_score(scores: list[dict[str, str]]) -> None:
    """The lesson's mistake: the tables of chat models hold no base model, and the other way round."""
    for row in scores:
        tuned = re.search(
            r"Chat Model|Instruction tuned|tech-report.pdf, Table 3", row["source"]
        )
        if "databricks" not in row["source"]:
            assert (row["variant"] == "instruct") == bool(tuned), row


def test_models_are_the_zoos_or_named_dense_partners(
    scores: list[dict[str, str]], tokens: list[dict[str, str]], page: Any
) -> None:
    without_shape = {
        "llama-1-33b",
        "llama-3-70b",
        "olmo-1b-0724",
        "olmo-7b-0724",
        "qwen2.5-72b",
    }
    for row in scores + tokens:
        assert row["model"] in {*zoo, *page["SHAPES"], *without_shape}, row


def test_dense_partners_have_the_sizes_that_their_authors_print(page: Any) -> None:
    printed = {  # model cards, arXiv:2401.06066 Table 3, names
        "llama-2-13b": 13.0,
        "llama-3.1-405b": 405.9,
        "deepseek-7b": 6.9,
        "deepseek-67b": 67.4,
        "qwen3-4b": 4.0,
        "qwen3-14b": 14.8,
        "qwen3-32b": 32.8,
    }
    assert printed.keys() == page["SHAPES"].keys()
    for name, billions in printed.items():
        assert page["models"][name].total_params() / 1e9 == pytest.approx(
            billions, abs=0.06
        )


def test_training_compute_is_the_authors_own(page: Any) -> None:
    """Llama 3 (arXiv:2407.21783, section 1) prints 3.8e25 FLOPs; OLMoE (arXiv:2409.02060, section 4.1.2) 3e22."""
    assert page["training_flops"]("llama-3.1-405b") == pytest.approx(3.8e25, rel=0.02)
    assert page["training_flops"]("olmoe-1b-7b") == pytest.approx(3e22, rel=0.25)


def test_five_of_the_lessons_fifteen_cells_are_published_nowhere(
    scores: list[dict[str, str]], page: Any, root: Path
) -> None:
    """Counted here from the file alone, and as the ledger judges the cells C140 to C154."""
    benchmarks = ("MMLU", "HumanEval", "HellaSwag")
    known = {(r["model"], r["benchmark"], float(r["value"])) for r in scores}
    cells = [
        (model, benchmark, value)
        for model, values in page["lesson"].items()
        for benchmark, value in zip(benchmarks, values, strict=True)
    ]
    verdicts = {row["id"]: row["verdict"] for row in read(root, "claims.csv")}
    judged = [verdicts[f"C{140 + i}"] for i in range(15)]
    assert [cell not in known for cell in cells] == [v == "wrong" for v in judged]
    assert judged.count("wrong") == 5


def test_the_counts_of_wins(page: Any) -> None:
    """Against tables copied by hand, and the signs of a difference."""
    gaps = page["compare"]("mixtral-8x7b", "llama-2-70b", "arXiv:2401.04088, Table 2")
    assert gaps[("MMLU", "5-shot")] == 0.7
    assert gaps[("HellaSwag", "0-shot")] == -1.0
    assert sum(gap > 0 for gap in gaps.values()) == 9
    assert len(gaps) == 12
    other = page["compare"]("llama-2-70b", "mixtral-8x7b", "arXiv:2401.04088, Table 2")
    assert other == {key: -gap for key, gap in gaps.items()}
    assert len(page["compare"]("deepseek-v3", "llama-3.1-405b", "deepseek-ai/")) == 31
