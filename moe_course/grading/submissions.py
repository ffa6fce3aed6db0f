"""Finding and reading what a class handed in: files, folders and zip archives, none trusted or written to disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from moe_course.grading.core import load_exercise
from moe_course.grading.run import UnreadableError, exercises_named

MOST_BYTES = 20 * 2**20  # of one notebook
MOST_MEMBERS = 20_000  # of one archive
MOST_CELLS = 2_000


@dataclass(frozen=True)
class Submission:
    """One file of one student: its bytes, or why there are none."""

    student: str
    name: str  # of the file, as it was found
    content: bytes = b""
    reason: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content + b"\0" + self.reason.encode()).hexdigest()


def collect(paths: list[Path]) -> list[Submission]:
    """Every notebook named, inside the folders named, or inside the zip archives found.

    Raises UnreadableError on a path that is not there and when there is no notebook at all.
    """
    found: list[Submission] = []
    for path in paths:
        if not path.exists() and not path.is_symlink():
            raise UnreadableError(f"{path}: there is no such file or folder")
        if path.is_dir() and path.suffix != ".ipynb":
            for inside in sorted(path.rglob("*")):
                hidden = ".ipynb_checkpoints" in inside.parts
                if inside.suffix.lower() in (".ipynb", ".zip") and not hidden:
                    found += _read(inside, inside.relative_to(path).as_posix())
        else:
            found += _read(path, path.name)
    if not found:
        raise UnreadableError(f"no notebook in {', '.join(map(str, paths))}")
    return _named_apart(found)


def _named_apart(found: list[Submission]) -> list[Submission]:
    """A student is the file's stem where that is unique, its whole path where not; the same path twice is numbered."""
    stems = Counter(PurePosixPath(s.name).stem for s in found)
    seen: Counter[str] = Counter()
    apart = []
    for one in found:
        stem = PurePosixPath(one.name).stem
        student = stem if stems[stem] == 1 else one.name.removesuffix(".ipynb")
        seen[student] += 1
        if seen[student] > 1:
            student = f"{student} ({seen[student]})"
        apart.append(replace(one, student=student))
    return apart


def _read(path: Path, name: str) -> Iterator[Submission]:
    if path.suffix.lower() == ".zip":
        yield from _members(path, name)
        return
    try:
        kind = path.lstat().st_mode
        if stat.S_ISLNK(kind):
            yield Submission(
                "", name, reason="a symbolic link; hand in the file itself"
            )
        elif stat.S_ISDIR(kind):
            yield Submission("", name, reason="a folder, not a file")
        elif not stat.S_ISREG(kind):
            yield Submission("", name, reason="not a regular file")
        else:
            # Not through a link that takes its place meanwhile.
            with os.fdopen(
                os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb"
            ) as file:
                yield _bounded(file, name)
    except OSError as error:
        yield Submission("", name, reason=f"cannot be read ({error.strerror})")


def _bounded(file: BinaryIO | Any, name: str) -> Submission:
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        return Submission("", name, reason=f"larger than {MOST_BYTES // 2**20} MiB")
    return Submission("", name, content)


def _members(path: Path, name: str) -> Iterator[Submission]:
    """The notebooks of an archive. Members are read, never extracted: a path with .. is a name like any other."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MOST_MEMBERS:
                yield Submission(
                    "", name, reason=f"an archive of more than {MOST_MEMBERS:,} files"
                )
                return
            for member in sorted(members, key=lambda m: m.filename):
                inside = PurePosixPath(member.filename)
                skip = (
                    "__MACOSX" in inside.parts or ".ipynb_checkpoints" in inside.parts
                )
                if inside.suffix.lower() != ".ipynb" or member.is_dir() or skip:
                    continue
                label = f"{name}/{member.filename}"
                try:
                    with archive.open(member) as file:
                        yield _bounded(file, label)
                except (
                    zipfile.BadZipFile,
                    RuntimeError,
                    NotImplementedError,
                    OSError,
                    EOFError,
                ) as error:
                    yield Submission(
                        "", label, reason=f"cannot be read from its archive ({error})"
                    )
                except Exception as error:  # zlib and lzma raise errors of their own
                    yield Submission(
                        "", label, reason=f"is damaged ({type(error).__name__})"
                    )
    except (zipfile.BadZipFile, OSError) as error:
        yield Submission("", name, reason=f"no zip archive ({error})")


def code_cells(content: bytes, number: str) -> list[str]:
    """The code of a notebook's cells. Raises UnreadableError on what is no notebook of that exercise."""
    if not content.strip():
        raise UnreadableError("the file is empty")
    try:
        notebook = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UnreadableError("not text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        text = content[:1].lstrip() == b"{" and "cut off or damaged"
        raise UnreadableError(f"no notebook ({text or 'not JSON'})") from error
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise UnreadableError(
            "JSON, but no notebook (or one of the old format 3: save it again)"
        )
    if len(cells) > MOST_CELLS:
        raise UnreadableError(f"more than {MOST_CELLS:,} cells")
    code = []
    for cell in cells:
        source = cell.get("source") if isinstance(cell, dict) else None
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if not isinstance(source, str):
            raise UnreadableError("JSON, but a cell of it has no source")
        if cell.get("cell_type") == "code":
            code.append(source)
    _require_exercise(notebook, code, number)
    return code


def _require_exercise(notebook: dict[str, Any], code: list[str], number: str) -> None:
    text = "\n".join(code)
    named = set(exercises_named(notebook.get("metadata"), text))
    if named and number not in named:
        raise UnreadableError(f"is exercise {', '.join(sorted(named))}, not {number}")
    answers = [question.answer for question in load_exercise(number).questions]
    if not named and not any(re.search(rf"\b{name}\b", text) for name in answers):
        raise UnreadableError(f"a notebook, but not of exercise {number}")
