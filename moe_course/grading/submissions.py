"""Finding and reading what a class handed in: files, folders and zip archives, none trusted or written to disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
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


@dataclass(frozen=True)
class Found:
    """A file of one student that has not been read yet."""

    student: str
    name: str  # of the file, as it was found
    path: Path
    member: str = ""  # of the archive at that path
    reason: str = ""  # why it cannot be read, where that is known already


def collect(paths: list[Path]) -> list[Found]:
    """Every notebook named, inside the folders named, or inside the zip archives found.

    Raises UnreadableError on a path that is not there and when there is no notebook at all.
    """
    found: list[Found] = []
    for path in paths:
        if not path.exists() and not path.is_symlink():
            raise UnreadableError(f"{path}: there is no such file or folder")
        if path.is_dir() and path.suffix != ".ipynb":
            for inside in sorted(path.rglob("*")):
                hidden = ".ipynb_checkpoints" in inside.parts
                if inside.suffix.lower() in (".ipynb", ".zip") and not hidden:
                    found += _files(inside, inside.relative_to(path).as_posix())
        else:
            found += _files(path, path.name)
    if not found:
        raise UnreadableError(f"no notebook in {', '.join(map(str, paths))}")
    return _named_apart(found)


def _named_apart(found: list[Found]) -> list[Found]:
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


def _files(path: Path, name: str) -> Iterator[Found]:
    """The file itself, or the notebooks of an archive. A member's path with .. is a name like any other."""
    if path.suffix.lower() != ".zip":
        yield Found("", name, path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        yield Found("", name, path, reason=f"no zip archive ({error})")
        return
    if len(members) > MOST_MEMBERS:
        reason = f"an archive of more than {MOST_MEMBERS:,} files"
        yield Found("", name, path, reason=reason)
        return
    for member in sorted(members):
        inside = PurePosixPath(member)
        skip = "__MACOSX" in inside.parts or ".ipynb_checkpoints" in inside.parts
        if inside.suffix.lower() == ".ipynb" and not member.endswith("/") and not skip:
            yield Found("", f"{name}/{member}", path, member)


def read(found: Iterable[Found]) -> Iterator[Submission]:
    """The submissions, one at a time: a class need not fit into memory."""
    for path, group in groupby(found, key=lambda one: one.path):
        archive: Any = None
        for one in group:
            content, reason = b"", one.reason
            try:
                if one.member and archive is None:
                    archive = zipfile.ZipFile(path)
                if not reason:
                    with (
                        archive.open(one.member) if one.member else _open(path) as file
                    ):
                        content = file.read(MOST_BYTES + 1)
                if len(content) > MOST_BYTES:
                    content, reason = b"", f"larger than {MOST_BYTES // 2**20} MiB"
            except UnreadableError as error:
                reason = str(error)
            except OSError as error:
                reason = f"cannot be read ({error.strerror or error})"
            except Exception as error:  # zlib and lzma raise errors of their own
                reason = f"is damaged ({type(error).__name__}: {error})"
            yield Submission(one.student, one.name, content, reason)
        if archive is not None:
            archive.close()


def _open(path: Path) -> BinaryIO:
    kind = path.lstat().st_mode
    if stat.S_ISLNK(kind):
        raise UnreadableError("a symbolic link; hand in the file itself")
    if stat.S_ISDIR(kind):
        raise UnreadableError("a folder, not a file")
    if not stat.S_ISREG(kind):
        raise UnreadableError("not a regular file")
    # Not through a link that takes its place meanwhile.
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")


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
