"""The quizzes: complete data, links that lead somewhere, and what a reader sees, with and without JavaScript."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_book import (  # fixtures are found by their names here
    DESKTOP,
    PAGES,
    PHONE,
    book,  # noqa: F401
    browser,  # noqa: F401
    page,  # noqa: F401
    serious_violations,
    site,  # noqa: F401
    soups,  # noqa: F401
)

ROOT = Path(__file__).resolve().parents[1]
QUIZZES = yaml.safe_load(
    (ROOT / "moe_course/data/quizzes.yaml").read_text(encoding="utf8")
)
QUESTIONS = [
    pytest.param(part, question, id=f"{part}-{number}")
    for part, questions in QUIZZES.items()
    for number, question in enumerate(questions, 1)
]


def test_every_part_has_its_quiz() -> None:
    parts = [name for name in PAGES if name.endswith("/quiz")]
    assert parts == [f"book/{part}/quiz" for part in QUIZZES]
    assert len(parts) == 7
    for part, questions in QUIZZES.items():
        source = (ROOT / f"book/{part}/quiz.md").read_text(encoding="utf8")
        assert source.count(f"```{{quiz}} {part}\n") == 1
        assert 6 <= len(questions) <= 8
        asked = [question["ask"] for question in questions]
        assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(("part", "question"), QUESTIONS)
def test_a_question_is_complete(part: str, question: dict[str, Any]) -> None:
    assert set(question) == {"ask", "see", "options"}
    options = question["options"]
    assert 3 <= len(options) <= 5
    assert sum("right" in option for option in options) == 1
    for option in options:
        assert set(option) in ({"right", "why"}, {"wrong", "why"})
        assert all(isinstance(text, str) and text.strip() for text in option.values())
        assert "\n" not in "".join(option.values())
    words = [option.get("right") or option["wrong"] for option in options]
    assert len(set(words)) == len(words)
    assert re.fullmatch(r"\[[^]]+\]\([^()#]+#[^()#]+\)", question["see"])


def test_the_right_option_stands_in_every_place() -> None:
    for part, questions in QUIZZES.items():
        places = [
            ["right" in option for option in question["options"]].index(True)
            for question in questions
        ]
        assert set(places) >= {0, 1, 2}, part
        assert max(map(places.count, places)) <= len(places) // 2, part


@pytest.mark.parametrize(("part", "question"), QUESTIONS)
def test_its_place_in_the_book_exists(
    part: str,
    question: dict[str, Any],
    soups: dict[str, Any],  # noqa: F811
) -> None:
    number = QUIZZES[part].index(question) + 1
    quiz = soups[f"book/{part}/quiz.html"].find(id=f"question-{number}")
    links = [link["href"] for link in quiz.select("details p a")]
    assert len(links) == 1  # a link that Sphinx cannot resolve would be gone
    target, _, anchor = links[0].partition("#")
    path = Path("book", part, target)
    parts: list[str] = []
    for piece in path.parts:
        if piece == "..":
            parts.pop()
        else:
            parts.append(piece)
    assert soups["/".join(parts)].find(id=anchor)


def test_without_javascript_every_answer_can_be_read(
    soups: dict[str, Any],  # noqa: F811
) -> None:
    for part, questions in QUIZZES.items():
        shown = soups[f"book/{part}/quiz.html"].select("fieldset.quiz")
        assert len(shown) == len(questions)
        for fieldset, question in zip(shown, questions, strict=True):
            assert fieldset.legend
            assert len(fieldset.select("label input[type=radio]")) == len(
                question["options"]
            )
            assert not fieldset.find("button")  # it would do nothing
            kinds = [item["class"] for item in fieldset.select("details li")]
            assert kinds == [
                ["quiz-right" if "right" in option else "quiz-wrong"]
                for option in question["options"]
            ]
            assert all(item.get_text() for item in fieldset.select(".quiz-why"))


def test_answers_open_in_a_browser_without_javascript(
    browser: Any,  # noqa: F811
    site: str,  # noqa: F811
) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=DESKTOP)
    plain = context.new_page()
    plain.goto(f"{site}book/concepts/quiz.html")
    first = plain.locator("fieldset.quiz").first
    assert not first.locator("li").first.is_visible()
    first.locator("summary").click()
    assert first.locator("li.quiz-right").is_visible()
    context.close()


@pytest.mark.parametrize("part", QUIZZES)
def test_a_choice_is_answered(
    part: str,
    page: Any,  # noqa: F811
    site: str,  # noqa: F811
) -> None:
    sent: list[str] = []
    page.goto(f"{site}book/{part}/quiz.html", wait_until="networkidle")
    before = page.evaluate("JSON.stringify(localStorage)")
    page.on("request", lambda request: sent.append(request.url))
    for fieldset, question in zip(
        page.locator("fieldset.quiz").all(), QUIZZES[part], strict=True
    ):
        feedback = fieldset.get_by_role("status")
        check = fieldset.get_by_role("button", name="Check")
        check.click()
        assert feedback.inner_text() == "Choose an option first."
        for place, option in enumerate(question["options"]):
            fieldset.locator("input").nth(place).check()
            assert not feedback.inner_text()  # until the button is pressed
            check.click()
            said = feedback.inner_text()
            assert said.startswith("Right. " if "right" in option else "Not this one. ")
            reason = fieldset.locator(".quiz-why").nth(place).text_content()
            assert said.endswith(reason)
    assert not [url for url in sent if "favicon" not in url]  # the browser's own
    assert page.evaluate("JSON.stringify(localStorage)") == before


def test_the_keyboard_is_enough(page: Any, site: str) -> None:  # noqa: F811
    page.goto(f"{site}book/math/quiz.html", wait_until="load")
    fieldset = page.locator("fieldset.quiz").first
    fieldset.locator("input").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert not fieldset.get_by_role("status").inner_text()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert fieldset.get_by_role("status").inner_text().startswith("Right. ")


def test_answered_quizzes_stay_accessible_and_fit_a_phone(
    page: Any,  # noqa: F811
    site: str,  # noqa: F811
) -> None:
    page.emulate_media(reduced_motion="reduce")  # colours are measured at once
    page.goto(f"{site}book/bandwidth/quiz.html", wait_until="load")
    for fieldset in page.locator("fieldset.quiz").all():
        fieldset.locator("input").first.check()
        fieldset.get_by_role("button").click()
        fieldset.locator("summary").click()
    assert not serious_violations(page, {})
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert not serious_violations(page, {"runOnly": ["color-contrast"]})
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
