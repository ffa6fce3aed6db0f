"""The claims ledger as a reader meets it, and what its verdicts stand on.

The page is built and opened as in tests/test_book.py.
"""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import nbformat
import pytest
from test_book import (  # the fixtures
    PHONE,
    book,  # noqa: F401
    browser,  # noqa: F401
    page,  # noqa: F401
    site,  # noqa: F401
    soups,  # noqa: F401
)

LEDGER = "book/reference/claims.html"
VERDICTS = ("holds", "holds if", "imprecise", "wrong", "not checkable")
TEXTS = {
    "overview": 54,
    "lesson": 123,
    "comparison": 55,
}  # and how many claims each has
SEARCHED = ("id", "claim", "verdict", "finding", "source", "text")

# What the column `source` may hold, separated by semicolons. Evidence of our own:
OWN = re.compile(
    r"run|recorded run( \([\w.]+\))?|own count|own computation|zoo|definition|the source's code"
)
# and what others have published; each may be followed by a place in it:
PUBLISHED = re.compile(
    r"(arXiv:\d{4}\.\d{5}( and \d{4}\.\d{5})?"  # a paper, or two
    r"|[\w-]+\.(com|ai|co|org)/[\w./-]+"  # a page
    r"|[\w.-]+/[\w.-]+ [\w./-]+\.\w+"  # a file of a repository: owner/name path
    r"|(DeepEP|PEFT|transformers)( \d[\d.]+)?, [\w./]+|PEFT \d[\d.]+"  # of a project of one name
    r"|model card of [\w .-]+"
    r"|[\w ]+ data sheet)"
    r"(, .+)?"
)


def unsupported(claim: dict[str, str]) -> str:
    """What is wrong with the evidence of a claim; empty where nothing is."""
    if claim["verdict"] == "not checkable":
        # It stands on its reason, not on evidence.
        return "" if len(claim["finding"].split()) >= 4 else "no reason given"
    unknown = [
        piece
        for piece in claim["source"].split("; ")
        if not OWN.fullmatch(piece) and not PUBLISHED.fullmatch(piece)
    ]
    return f"neither a run, a closed form nor a source: {unknown}" if unknown else ""


@pytest.fixture(scope="module")
def claims(root: Path) -> list[dict[str, str]]:
    path = root / "moe_course" / "data" / "claims.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expected(
    claims: list[dict[str, str]], q: str = "", **chosen: str
) -> list[dict[str, str]]:
    """The rows that a choice leaves: equal in every chosen column, with every word somewhere."""
    return [
        claim
        for claim in claims
        if all(claim[column] == value for column, value in chosen.items() if value)
        and all(
            any(word in claim[column].lower() for column in SEARCHED)
            for word in q.lower().split()
        )
    ]


def counted(some: list[dict[str, str]], claims: list[dict[str, str]]) -> str:
    counts = Counter(claim["verdict"] for claim in some)
    tally = ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS)
    return f"{len(some)} of {len(claims)} claims: {tally}"


def choices(claims: list[dict[str, str]], n: int) -> list[dict[str, str]]:
    """Random combinations of filters and words; half of them are true of some claim."""
    draw = random.Random(7)
    found = []
    for i in range(n):
        one, other = draw.sample(claims, 2)
        if i % 2:
            other = one
        chosen = {
            name: draw.choice((one, other))[name]
            for name in ("verdict", "part", "text")
            if draw.random() < 0.4
        }
        if draw.random() < 0.7:
            words = " ".join(other[column] for column in SEARCHED).split()
            cut = [w[draw.randrange(len(w)) :] for w in draw.choices(words, k=2)]
            change = draw.choice((str.upper, str.lower, str))
            chosen["q"] = "  ".join(change(word) for word in cut[: draw.choice((1, 2))])
        found.append(chosen)
    return found


def shown(tab: Any) -> list[str]:
    """The ids of the rows that can be seen, in order."""
    return tab.locator(".ledger > li:visible strong").all_inner_texts()


def ids(some: list[dict[str, str]]) -> list[str]:
    return [claim["id"] for claim in some]


# ---- The data ------------------------------------------------------------------------------------------------


def test_every_verdict_stands_on_something(claims: list[dict[str, str]]) -> None:
    faults = {c["id"]: fault for c in claims if (fault := unsupported(c))}
    assert not faults


@pytest.mark.parametrize(
    ("verdict", "finding", "source"),
    [
        ("holds", "Everybody knows it.", "-"),
        ("holds", "Everybody knows it.", ""),
        ("wrong", "It is not so.", "common knowledge"),
        ("wrong", "It is not so.", "run; somebody said so"),
        ("imprecise", "Roughly.", "arXiv:123"),
        ("holds if", "Perhaps.", "runs"),
        ("not checkable", "-", "-"),
        ("not checkable", "Unknown.", "run"),
    ],
)
def test_a_verdict_without_evidence_is_refused(
    verdict: str, finding: str, source: str
) -> None:
    assert unsupported({"verdict": verdict, "finding": finding, "source": source})


def test_what_a_run_shows_is_run_on_its_page(
    root: Path, claims: list[dict[str, str]]
) -> None:
    """A verdict that rests on a run stands on a page that computes something."""
    for claim in claims:
        if re.search(r"\brun\b|own c", claim["source"]):
            path = root / "book" / f"{claim['page']}.ipynb"
            cells = nbformat.read(path, as_version=4).cells
            assert sum(cell.cell_type == "code" for cell in cells) > 1, claim["id"]


def test_every_claim_names_its_text(claims: list[dict[str, str]]) -> None:
    counts = Counter(claim["text"] for claim in claims)
    assert counts.keys() <= TEXTS.keys()
    for text, most in TEXTS.items():
        assert counts[text] <= most
    if len(claims) == sum(TEXTS.values()):
        assert counts == TEXTS


# ---- The page ------------------------------------------------------------------------------------------------


def test_all_claims_show_without_javascript(
    browser: Any,  # noqa: F811
    site: str,  # noqa: F811
    claims: list[dict[str, str]],
) -> None:
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(f"{site}{LEDGER}?verdict=wrong")
    assert shown(plain) == ids(claims)
    assert not plain.locator(".ledger-form").is_visible()
    assert plain.locator("#ledger-count").inner_text() == counted(claims, claims)
    for claim, row in zip(
        claims, plain.locator(".ledger > li").all_inner_texts(), strict=True
    ):
        text = " ".join(row.split())
        for column in SEARCHED:
            if claim[column] != "-":
                assert " ".join(claim[column].split()) in text, claim["id"]
    context.close()


def test_filters_leave_the_rows_that_python_leaves(
    page: Any,  # noqa: F811
    site: str,  # noqa: F811
    claims: list[dict[str, str]],
) -> None:
    page.goto(f"{site}{LEDGER}")
    assert shown(page) == ids(claims)
    sizes = []
    for chosen in choices(claims, 40):
        for name in ("verdict", "part", "text"):
            page.locator(f".ledger-form [name={name}]").select_option(
                chosen.get(name, "")
            )
        page.locator(".ledger-form [name=q]").fill(chosen.get("q", ""))
        left = expected(claims, **chosen)
        assert shown(page) == ids(left), chosen
        assert page.locator("#ledger-count").inner_text() == counted(left, claims)
        query = {k: v[0] for k, v in parse_qs(urlsplit(page.url).query).items()}
        assert query == {k: v for k, v in chosen.items() if v}
        sizes.append(len(left))
    assert 0 in sizes
    assert sum(0 < size < len(claims) for size in sizes) >= 20


def test_an_address_keeps_its_filters(
    page: Any,  # noqa: F811
    site: str,  # noqa: F811
    claims: list[dict[str, str]],
) -> None:
    for chosen in choices(claims, 12):
        page.goto(f"{site}{LEDGER}?{urlencode(chosen)}")
        assert shown(page) == ids(expected(claims, **chosen)), chosen
        for name in ("verdict", "part", "text", "q"):
            field = page.locator(f".ledger-form [name={name}]")
            assert field.input_value() == chosen.get(name, "")
    page.goto(f"{site}{LEDGER}?verdict=nonsense&q=%F0%9F%8D%8B")
    assert shown(page) == []
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("!location.search")
    assert shown(page) == ids(claims)


def test_the_ledger_can_be_used_by_keyboard_and_heard(
    page: Any,  # noqa: F811
    site: str,  # noqa: F811
    claims: list[dict[str, str]],
) -> None:
    page.goto(f"{site}{LEDGER}")
    form = page.get_by_role("search", name="Filter the claims")
    form.get_by_label("Verdict").focus()
    page.keyboard.type("wro")
    for label in ("Part", "Source text", "Words"):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.closest('label').textContent")
        assert name.startswith(label)
    page.keyboard.type("mixtral")
    page.keyboard.press("Enter")  # no page is loaded anew
    left = expected(claims, verdict="wrong", q="mixtral")
    assert left
    assert shown(page) == ids(left)
    status = page.get_by_role("status").filter(has_text="claims")
    assert status.inner_text() == counted(left, claims)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("!location.search")
    assert shown(page) == ids(claims)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_ledger_fits_a_phone(
    browser: Any,  # noqa: F811
    site: str,  # noqa: F811
    theme: str,
) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme=theme)
    phone = context.new_page()
    phone.goto(f"{site}{LEDGER}?verdict=wrong")
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for field in phone.locator(".ledger-form select, .ledger-form input").all():
        box = field.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        assert box["height"] >= 24
    context.close()


def test_every_row_leads_to_its_place(
    soups: dict[str, Any],  # noqa: F811
    claims: list[dict[str, str]],
) -> None:
    """The link of a row names a page that was built and an anchor on it, and the verdict's badge is there."""
    anchors = {
        name: {tag["id"] for tag in soup.find_all(id=True)}
        for name, soup in soups.items()
    }
    rows = soups[LEDGER].select(".ledger > li")
    assert len(rows) == len(claims)
    for claim, row in zip(claims, rows, strict=True):
        path, _, anchor = row.find("a")["href"].partition("#")
        target = f"book/{path.removeprefix('../')}"
        assert (target, anchor) == (f"book/{claim['page']}.html", claim["anchor"])
        assert anchor in anchors.get(target, set()), claim["id"]
        badge = f"verdict-{claim['verdict'].replace(' ', '-')}"
        assert badge in row.find(class_="verdict")["class"], claim["id"]


def test_the_landing_page_counts_what_the_ledger_counts(
    root: Path,
    soups: dict[str, Any],  # noqa: F811
    claims: list[dict[str, str]],
) -> None:
    landing = soups["book/intro.html"].find(id="claim-counts")
    counts = Counter(claim["verdict"] for claim in claims)
    for verdict, link in zip(VERDICTS, landing.find_all("a"), strict=True):
        assert link.get_text() == f"{verdict}: {counts[verdict]}"
        assert parse_qs(urlsplit(link["href"]).query) == {"verdict": [verdict]}
        assert (Path("book") / urlsplit(link["href"]).path).as_posix() == LEDGER
    assert landing.get_text().endswith(f"{len(claims)} in all.")
    total = sum(TEXTS.values())
    for name in ("intro", "reference/claims"):
        cells = nbformat.read(root / "book" / f"{name}.ipynb", as_version=4).cells
        prose = " ".join(c.source for c in cells if c.cell_type == "markdown")
        assert re.findall(r"(\d+)\sclaims", prose) == [str(total)], name
