"""The course as a class gets it: book, package and exercises, without solutions and filed answers.

python -m moe_course.grading.classroom OUT        (make classroom OUT=...)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Their place in the repository; everything else goes along.
LEFT_OUT = ("solutions", "tests", ".ci", ".github", "benchmarks")


class ClassroomError(RuntimeError):
    """Nothing was exported; the text says why."""


def exported(root: Path) -> list[str]:
    """The files of a course that a class gets: those under version control, but for what gives answers away."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ClassroomError(f"{root} is no git checkout of the course") from error
    names = [name for name in listed.decode().split("\0") if name]
    return [n for n in names if n.split("/")[0] not in LEFT_OUT]


def export(root: Path, out: Path) -> int:
    """Copy the course to a new folder; returns how many files. Raises ClassroomError and leaves nothing half done."""
    if out.exists() and any(out.iterdir()):
        raise ClassroomError(f"{out} is not empty: name a new folder")
    names = exported(root)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise ClassroomError(f"{missing[0]} is under version control and not there")
    try:
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, out / name)
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise ClassroomError(f"cannot write {out}: {error.strerror}") from error
    return len(names)


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 1 or not words[0]:
        print("usage: make classroom OUT=FOLDER", file=sys.stderr)
        return 2
    try:
        count = export(Path.cwd(), Path(words[0]))
    except ClassroomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} files in {words[0]}, without {', '.join(LEFT_OUT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
