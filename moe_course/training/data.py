"""Text for byte-level language models: six domains, held out by document, every arm with equally many unique bytes.

    prose       Shakespeare's and Milton's works        shipped      public domain
    c           SQLite's C source                       shipped      public domain
    python      Python's standard library               shipped      PSF licence
    manual      Python's documentation                  shipped      PSF licence
    arithmetic  sums, differences, products, quotients  generated
    logs        lines of a web service                  generated

A token is a byte: V = 256, and no tokeniser stands between the text and the loss, which is in bits per byte.

The shipped text lies in `corpus/`, with its licences and the script that builds it, `corpus.build`.

Chapter: book/math/compute_equivalence.
"""

from __future__ import annotations

import json
import lzma
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

SHIPPED = ("prose", "c", "python", "manual")
GENERATED = ("arithmetic", "logs")
DOMAINS = SHIPPED + GENERATED
SPLITS = ("train", "held_out")
VOCAB = 256

CORPUS = Path(__file__).parent / "corpus"


class Document(NamedTuple):
    """A play, a file, or the output of one seed: what is held out is held out whole."""

    name: str
    text: bytes


# --- Loading -------------------------------------------------------------------------


def documents(domain: str, split: str) -> Iterator[Document]:
    """The documents of a domain, always in the same order. Raises ValueError on an unknown domain or split."""
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return _shipped(domain, split) if domain in SHIPPED else _generated(domain, split)


def load(
    domains: Sequence[str], split: str, size: int | None = None
) -> UInt8[Tensor, " N"]:
    """The text of `domains`, one after the other: all of it, or `size` bytes in equal shares.

    No byte is repeated, so arms of one size have equally many unique bytes, whether
    they come from one domain or from six. Raises ValueError when a domain has too few,
    is unknown or is named twice.
    """
    if not domains or len(set(domains)) < len(domains):
        raise ValueError(f"domains must be one or more, each once, got {domains!r}")
    parts = []
    for i, domain in enumerate(domains):
        share = None
        if size is not None:  # the first domains take the bytes that do not divide
            share = size // len(domains) + (i < size % len(domains))
        parts.append(_head(domain, split, share))
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def _head(domain: str, split: str, size: int | None) -> bytes:
    text = bytearray()
    for document in documents(domain, split):
        if size is not None and len(text) >= size:
            break
        text += document.text
    if size is not None and len(text) < size:
        raise ValueError(
            f"{domain} has {len(text):,} bytes in split {split!r}, {size:,} were asked for"
        )
    return bytes(text[:size])


@cache
def manifest() -> dict[str, Any]:
    """Of each shipped domain: licence, source, SHA-256 of its text, and the documents with split and length."""
    entries: dict[str, Any] = json.loads((CORPUS / "manifest.json").read_text("utf-8"))
    return entries


@cache
def _text(domain: str) -> bytes:
    return lzma.decompress((CORPUS / f"{domain}.xz").read_bytes())


def _shipped(domain: str, split: str) -> Iterator[Document]:
    start, text = 0, _text(domain)
    for name, where, length in manifest()[domain]["documents"]:
        if where == split:
            yield Document(name, text[start : start + length])
        start += length


# --- Batches -------------------------------------------------------------------------


class Batches:
    """Windows of a text in random order, each exactly once in a pass; batch i is a function of the seed and i alone.

    Window w predicts bytes w·S + 1 ... (w + 1)·S from those before them, S the context:
    windows do not overlap in what they predict. Every pass has an order of its own; the
    windows that do not fill a batch are left out of that pass.

    `len` is the number of batches of all passes. At most two passes: later ones measure
    memory rather than language. Raises ValueError on that and on a text too short for
    one batch.
    """

    MOST_PASSES = 2

    def __init__(
        self,
        text: UInt8[Tensor, " N"],
        context: int,
        batch_size: int,
        seed: int,
        passes: int = 1,
    ) -> None:
        if not 1 <= passes <= self.MOST_PASSES:
            raise ValueError(f"passes must be 1 or {self.MOST_PASSES}, got {passes}")
        if context < 1 or batch_size < 1:
            raise ValueError(
                f"context and batch_size must be at least 1, got {context}, {batch_size}"
            )
        self.text, self.context, self.batch_size = text, context, batch_size
        self.passes = passes
        windows = (len(text) - 1) // context
        self.per_pass = windows // batch_size
        if self.per_pass < 1:
            raise ValueError(
                f"{len(text):,} bytes are too few for a batch of {batch_size} windows of {context}"
            )
        self.orders = [
            torch.randperm(
                windows, generator=torch.Generator().manual_seed(2 * seed + turn)
            )
            for turn in range(passes)
        ]

    def __len__(self) -> int:
        return self.passes * self.per_pass

    def __getitem__(self, step: int) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
        """Bytes and the bytes that follow them. Raises IndexError when the passes are used up."""
        if not 0 <= step < len(self):
            raise IndexError(
                f"step {step}: {self.passes} passes hold {len(self)} batches"
            )
        turn, place = divmod(step, self.per_pass)
        first = place * self.batch_size
        starts = self.orders[turn][first : first + self.batch_size] * self.context
        at = starts[:, None] + torch.arange(self.context + 1)  # [B, S + 1]
        window = self.text[at].long()
        return window[:, :-1], window[:, 1:]

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context


# --- Generated domains ---------------------------------------------------------------

DOCUMENT_BYTES = 16_384
# The numbers of the documents are their seeds: those held out lie far beyond the others.
_NUMBERS = {"train": range(256), "held_out": range(1_000_000, 1_000_016)}


def _generated(domain: str, split: str) -> Iterator[Document]:
    for number in _NUMBERS[split]:
        yield Document(f"{domain}/{number}", _document(domain, number))


@cache
def _document(domain: str, number: int) -> bytes:
    # Only .random() is promised to give the same numbers in every version of Python.
    draw = random.Random(2 * number + GENERATED.index(domain)).random
    lines = (_arithmetic if domain == "arithmetic" else _logs)(draw, number)
    text = bytearray()
    while len(text) < DOCUMENT_BYTES:
        text += next(lines).encode()
    return bytes(text[:DOCUMENT_BYTES])


def is_held_out(problem: str) -> bool:
    """A tenth of all problems occurs in held-out documents only: `12 + 30` is never both trained and tested."""
    return zlib.crc32(problem.encode()) % 10 == 0


def _arithmetic(draw: Callable[[], float], number: int) -> Iterator[str]:
    held_out = number in _NUMBERS["held_out"]
    while True:
        a, b = (1 + int(draw() * 10 ** (1 + int(draw() * 4))) for _ in range(2))
        kind = "+-*/"[int(draw() * 4)]
        problem = f"{a} {kind} {b}"
        if is_held_out(problem) != held_out:
            continue
        if kind == "/":
            yield f"{problem} = {a // b} remainder {a % b}\n"
        else:
            yield f"{problem} = {a + b if kind == '+' else a - b if kind == '-' else a * b}\n"


_SERVICES = ("gateway", "orders", "billing", "search", "mailer", "cache", "auth")
_PATHS = ("cart", "items", "invoices", "session", "query", "users", "status", "export")


def _logs(draw: Callable[[], float], number: int) -> Iterator[str]:
    def one(of: Sequence[str]) -> str:
        return of[int(draw() * len(of))]

    def below(n: int) -> int:
        return int(draw() * n)

    # A document is one day of one service; the numbers wrap after 40 years.
    now = datetime(1990, 1, 1, tzinfo=UTC) + timedelta(days=number * 7919 % 14610)
    host = f"{one(_SERVICES)}-{below(40):02d}"
    while True:
        now += timedelta(milliseconds=below(4000))
        stamp = now.isoformat(timespec="milliseconds")[:23] + "Z"
        request, kind = f"{int(draw() * 2**32):08x}", draw()
        client = f"10.{below(256)}.{below(256)}.{below(256)}"
        if kind < 0.7:
            status = (200, 200, 200, 200, 201, 204, 304, 404, 403, 500)[below(10)]
            method = "POST" if status == 201 else "GET"
            yield (
                f"{stamp} {host} INFO  request={request} client={client} {method} "
                f"/v{1 + below(3)}/{one(_PATHS)}/{below(100_000)} {status} {1 + below(900)} ms\n"
            )
        elif kind < 0.9:
            hits = below(2000)
            yield (
                f"{stamp} {host} DEBUG request={request} cache {one(('hit', 'miss'))} "
                f"key={one(_PATHS)}:{below(100_000)} size={hits} bytes\n"
            )
        elif kind < 0.98:
            yield (
                f"{stamp} {host} WARN  request={request} slow query took "
                f"{1000 + below(9000)} ms, retry {1 + below(3)} of 3\n"
            )
        else:
            yield (
                f"{stamp} {host} ERROR request={request} {one(('timeout', 'connection reset', 'refused'))} "
                f"by {one(_SERVICES)}-{below(40):02d} after {below(30)} s\n"
            )
