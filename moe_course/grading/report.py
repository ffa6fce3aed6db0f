"""Pages for people: one of feedback per submission and one of the class. Plain HTML, readable offline.

What students wrote (names of files, messages of their errors) is escaped everywhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from html import escape

from moe_course.grading.core import FAILED, MARKS, NOT_REACHED, Exercise
from moe_course.grading.judge import GRADED, UNREADABLE, Result, Verdict

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #00704a; --bad: #b3261e; --mixed: #8a5a00; --bar: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff8a80; --mixed: #f2b84b; --bar: #56b4e9; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .6rem 1.6rem; font-size: .9rem; }
.passed { color: var(--good); } .failed { color: var(--bad); } .review { color: var(--mixed); }
.bar { display: inline-block; height: .8rem; background: var(--bar); vertical-align: middle; }
.wide { overflow-x: auto; }
"""


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is loaded and no script runs, whatever a student wrote.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def feedback_name(student: str) -> str:
    """A file name that no student chooses."""
    return hashlib.sha256(student.encode()).hexdigest()[:24] + ".html"


def feedback(student: str, result: Result, exercise: Exercise) -> str:
    """What one student gets back."""
    out_of = sum(v.out_of for v in result.verdicts)
    parts = [
        f"<h1>Exercise {exercise.number}, {escape(exercise.title)}</h1>",
        f"<p>{escape(student)}: <strong>{result.points} of {out_of} points</strong></p>",
    ]
    if result.status != GRADED:
        parts.append(
            f'<p class="review">{_status(result.status)}: {escape(result.reason)}</p>'
        )
    if not result.sandboxed:
        parts.append('<p class="review">Graded without a sandbox.</p>')
    parts += [_question(v) for v in result.verdicts]
    if result.troubles:
        parts.append("<h2>While your notebook ran</h2>")
        parts += [f"<pre>{escape(trouble)}</pre>" for trouble in result.troubles]
    return _page(f"Exercise {exercise.number}: {student}", "\n".join(parts))


def _status(status: str) -> str:
    return {
        "needs-review": "A person will look at this",
        "unreadable": "Could not be read",
    }[status]


def _question(verdict: Verdict) -> str:
    rows = [
        f"<h2>{verdict.question} {escape(verdict.title)}: {verdict.points} of {verdict.out_of}</h2>"
    ]
    if (
        verdict.status != GRADED
        or not verdict.lines
        or verdict.reason.startswith("set by hand")
    ):
        kind = "" if verdict.status == GRADED else ' class="review"'
        rows.append(f"<p{kind}>{escape(verdict.reason)}</p>")
    for line in verdict.lines:
        status = str(line["status"])
        rows.append(
            f'<div class="{"failed" if status in (FAILED, NOT_REACHED) else "passed"}">{MARKS.get(status, "")} '
            f"{escape(str(line['name']))}{' (not reached)' if status == 'not reached' else ''}</div>"
        )
        if line["detail"]:
            rows.append(f"<pre>{escape(str(line['detail']))}</pre>")
        if line["hint"]:
            rows.append(f"<pre>Hint: {escape(str(line['hint']))}</pre>")
    return "\n".join(rows)


class Summary:
    """Counts of a class, fed one result at a time: a row of text for each submission is all that it keeps."""

    def __init__(self, exercise: Exercise) -> None:
        self.exercise = exercise
        self.statuses: Counter[str] = Counter()
        self.points: dict[str, Counter[int]] = {}
        self.out_of: dict[str, int] = {}
        self.titles: dict[str, str] = {}
        self.failed: Counter[tuple[str, str]] = Counter()
        self.students: list[str] = []
        self.review: list[str] = []
        self.unsandboxed = 0

    def add(self, student: str, result: Result) -> None:
        self.statuses[result.status] += 1
        self.unsandboxed += not result.sandboxed
        # What nobody could read says nothing about the questions.
        for v in result.verdicts if result.status != UNREADABLE else ():
            self.points.setdefault(v.question, Counter())[v.points] += 1
            self.out_of[v.question], self.titles[v.question] = v.out_of, v.title
            for line in v.lines:
                if line["status"] == "failed":
                    self.failed[v.question, str(line["name"])] += 1
        link = f'<a href="feedback/{feedback_name(student)}">{escape(student)}</a>'
        self.students.append(
            f'<tr><td>{link}</td><td class="n">{result.points}</td><td>{escape(result.status)}</td></tr>'
        )
        if result.status != GRADED:
            self.review.append(
                f"<tr><td>{link}</td><td>{escape(result.status)}</td><td>{escape(result.reason)}</td></tr>"
            )

    def page(self) -> str:
        total = sum(self.statuses.values())
        counts = ", ".join(
            f"{n} {status}" for status, n in sorted(self.statuses.items())
        )
        title = f"Exercise {self.exercise.number}, {self.exercise.title}: {total} submissions"
        parts = [f"<h1>{escape(title)}</h1><p>{escape(counts)}</p>"]
        if self.unsandboxed:
            parts.append(
                f'<p class="review">{self.unsandboxed} of them were graded without a sandbox.</p>'
            )
        if self.review:
            parts.append(
                "<h2>For a person to look at</h2>"
                + _table(("submission", "status", "reason"), self.review)
            )
        parts.append("<h2>Points per question</h2>")
        parts.append(
            _table(
                ("question", "mean", "of", "points: how many got them"),
                map(self._distribution, self.points),
            )
        )
        if self.statuses[UNREADABLE]:
            parts.append("<p>Without what is unreadable.</p>")
        most = [
            f'<tr><td>{question}</td><td>{escape(name)}</td><td class="n">{n}</td></tr>'
            for (question, name), n in self.failed.most_common(10)
        ]
        parts.append(
            "<h2>Failed most often</h2>"
            + _table(("question", "what must hold", "failed"), most)
        )
        parts.append(
            "<h2>All submissions</h2>"
            + _table(("submission", "points", "status"), self.students)
        )
        return _page(title, "\n".join(parts))

    def _distribution(self, question: str) -> str:
        counts, out_of = self.points[question], self.out_of[question]
        total = sum(counts.values())
        mean = sum(points * n for points, n in counts.items()) / total
        bars = "".join(
            f"<div>{points}: <span class='bar' style='width:{12 * counts[points] / total:.2f}rem'></span> "
            f"{counts[points]}</div>"
            for points in range(out_of + 1)
            if counts[points]
        )
        name = f"{question} {escape(self.titles[question])}"
        return f'<tr><td>{name}</td><td class="n">{mean:.2f}</td><td class="n">{out_of}</td><td>{bars}</td></tr>'


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
