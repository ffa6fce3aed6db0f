"""Canvas and Moodle: whose file is whose, which attempt counts, and the gradebook that they read back.

The roster is the CSV that the instructor exports there: Canvas's gradebook (with a column ID) or Moodle's grading
worksheet (with a column Identifier). The same file, with one column filled, is what they import.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moe_course.grading.submissions import Found

# doejane_LATE_1234_567890_02_math-1.ipynb: user, file (a later upload has a larger number), -1 for a second upload
_CANVAS = re.compile(
    r"^[^_/]+_(?:LATE_)?(?P<user>\d+)_(?P<file>\d+)_.*?(?:-(?P<again>\d+))?$"
)
# Jane Doe_1234567_assignsubmission_file_/02_math.ipynb, or without the folder
_MOODLE = re.compile(r"(?:^|/)[^/]*_(?P<user>\d+)_assignsubmission_file_")

ID = {"canvas": "ID", "moodle": "Identifier"}


class RosterError(ValueError):
    """The roster cannot be used; the text says why."""


@dataclass(frozen=True)
class Roster:
    """A gradebook as it was exported: its lines, and which of them is which student's."""

    kind: str  # "canvas" or "moodle"
    header: list[str]
    lines: list[list[str]]

    @property
    def ids(self) -> dict[str, int]:
        """Line number by the student's number, which file names hold too."""
        column = self.header.index(ID[self.kind])
        found: dict[str, int] = {}
        for number, line in enumerate(self.lines):
            cell = line[column].strip() if column < len(line) else ""
            match = re.fullmatch(r"(?:Participant )?(\d+)", cell)
            if match:  # Canvas puts a line of "Points Possible" first
                found[match[1]] = number
        return found


def read_roster(path: Path) -> Roster:
    """A gradebook of Canvas or a grading worksheet of Moodle. Raises RosterError on another file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RosterError(f"cannot read {path}: {error}") from error
    header = [name.strip() for name in lines[0]] if lines else []
    for kind, column in ID.items():
        if column in header:
            roster = Roster(kind, header, lines[1:])
            if not roster.ids:
                raise RosterError(
                    f"{path}: no line of it has a number in the column {column}"
                )
            return roster
    raise RosterError(
        f"{path}: neither Canvas's gradebook (with a column ID) nor Moodle's worksheet (with a column Identifier)"
    )


def assign(found: list[Found], roster: Roster) -> tuple[list[Found], list[str]]:
    """The last attempt of each student, under the student's number; and the files that belong to none of them."""
    ids = roster.ids
    last: dict[str, tuple[tuple[int, int], Found]] = {}
    strangers = []
    for one in found:
        user, order = _owner(one.name, roster.kind)
        if user not in ids:
            strangers.append(one.name)
            continue
        if user not in last or order >= last[user][0]:
            last[user] = order, replace(one, student=user)
    return [last[user][1] for user in sorted(last, key=lambda u: ids[u])], strangers


def _owner(name: str, kind: str) -> tuple[str, tuple[int, int]]:
    if kind == "moodle":
        match = _MOODLE.search(name)
        return (match["user"], (0, 0)) if match else ("", (0, 0))
    stem = name.rsplit("/", 1)[-1].removesuffix(".ipynb")
    match = _CANVAS.match(stem)
    if not match:
        return "", (0, 0)
    return match["user"], (int(match["file"]), int(match["again"] or 0))


def filled(roster: Roster, points: Mapping[str, int], column: str | None = None) -> str:
    """The gradebook with the points in its column; lines of students without a result stay as they were.

    column: by default Moodle's `Grade`; with Canvas, as its header has it, number included.
    Raises RosterError where there is no such column.
    """
    name = column or ("Grade" if roster.kind == "moodle" else "")
    if name not in roster.header:
        known = ", ".join(repr(h) for h in roster.header)
        raise RosterError(
            f"the roster has no column {name!r}: choose one of {known} with --column"
        )
    at = roster.header.index(name)
    by_line = {line: user for user, line in roster.ids.items()}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n" if roster.kind == "canvas" else "\n")
    writer.writerow(roster.header)
    for number, line in enumerate(roster.lines):
        user = by_line.get(number)
        cells = line + [""] * (len(roster.header) - len(line))
        if user is not None and user in points:
            cells[at] = str(points[user])
        writer.writerow(cells)
    return out.getvalue()
