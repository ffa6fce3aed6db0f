"""What the whole course costs to build, to test and to load: cold, warm, tests, pages.

    python benchmarks/course.py [--record [PATH]]

Runs the README's commands in a fresh clone of HEAD, in a folder that is removed afterwards: `make book` with nothing
there (the environment is installed too), `make book` again, `make test`. Then weighs the pages: for each the HTML, and
all that a browser loads with it from the book itself. Run it on an otherwise quiet machine; about twenty minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin

from moe_course import records

RECORD = records.FOLDER / "course_cpu.json"
GOALS = {"make book, cold": 600.0, "make book, warm": 15.0, "make test": 900.0}
PAGE_GOAL = 1.5e6  # bytes sent, compressed; the playground brings a Python of its own
LOADED = re.compile(r'<(?:script|link|img)\b[^>]*?\b(?:src|href)="([^"#?]+)')


def seconds(command: list[str], folder: Path) -> tuple[float, str]:
    """How long a command takes, and what it printed. A failure ends the measurement."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    spent = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return spent, done.stdout


def page_bytes(html: Path, site: Path) -> tuple[int, int, int]:
    """Bytes of a page's HTML; of it and all files of the site that it names to load; the same, compressed (gzip)."""
    text = html.read_text(encoding="utf-8")
    base = html.relative_to(site).as_posix()
    files = {
        site / unquote(urljoin(base, address))
        for address in LOADED.findall(text)
        if "://" not in address and not address.endswith(".html")
    }
    contents = [file.read_bytes() for file in {html, *files} if file.is_file()]
    # What is compressed already is sent as it is.
    sent = sum(min(len(c), len(gzip.compress(c))) for c in contents)
    return html.stat().st_size, sum(map(len, contents)), sent


def rows(clone: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for what, command in (
        ("make book, cold", ["make", "book"]),
        ("make book, warm", ["make", "book"]),
        ("make test", ["make", "test"]),
    ):
        spent, printed = seconds(command, clone)
        goal = GOALS[what]
        said = re.findall(r"=+ (.*passed.*) in ", printed)
        found.append({"what": what, "time_s": round(spent, 1), "goal_s": goal})
        if said:
            found[-1]["tests"] = said[-1]
        print(f"{what:<20}{spent:>8.1f} s  (goal {goal:.0f} s)", flush=True)
    site = clone / "_build" / "html"
    for html in sorted(site.rglob("*.html")):
        if "_static" in html.parts:
            continue
        own, loaded, sent = page_bytes(html, site)
        found.append(
            {
                "page": html.relative_to(site).as_posix(),
                "html_bytes": own,
                "loaded_bytes": loaded,
                "sent_bytes": sent,
            }
        )
    pages = [row for row in found if "page" in row]
    largest = max(pages, key=lambda row: row["sent_bytes"])
    print(f"{len(pages)} pages; the largest, {largest['page']},", end=" ")
    print(f"is {largest['html_bytes'] / 1e6:.2f} MB of HTML, loads", end=" ")
    print(f"{largest['loaded_bytes'] / 1e6:.2f} MB, sent as", end=" ")
    print(f"{largest['sent_bytes'] / 1e6:.2f} MB (goal {PAGE_GOAL / 1e6} MB)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", nargs="?", type=Path, const=RECORD)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "course"
        subprocess.run(["git", "clone", "--quiet", os.curdir, str(clone)], check=True)
        with contextlib.chdir(clone):  # a record names the revision that it stands in
            record = records.measure(
                "course",
                "python benchmarks/course.py --record",
                rows(Path.cwd()),
                packages=("jupyter-book",),
            )
    if options.record:
        records.save(record, options.record)


if __name__ == "__main__":
    main()
