"""Values between the judge and the process that runs a submission: JSON and raw tensor bytes, bounded, never pickle.

A value becomes a list whose first entry tells its kind, so that what comes back has exactly the plain type it says: an
integer is an int, a tuple a tuple, and an object with an equality of its own arrives as its name alone. Neither side
trusts the other: `decode` raises WireError on whatever does not fit.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

MOST_BYTES = 64 * 2**20  # of one message
MOST_DEPTH = 40  # of lists within lists
LONGEST_INT = 4_000  # hexadecimal digits
LONGEST_TEXT = 100_000  # characters
HEADER = struct.Struct(">QI")  # bytes of the message, bytes of its JSON part

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)


class WireError(ValueError):
    """What came over the wire is no message, or is larger than allowed."""


class Opaque:
    """Something that does not cross the wire, under the name of its type; equal to nothing but itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


def encode(
    value: Any,
    blobs: list[bytes],
    handle: Callable[[Any], list[Any] | None] = lambda _: None,
    depth: int = 0,
) -> list[Any]:
    """The value as JSON, the bytes of its tensors appended to `blobs`.

    handle: called on what is no plain value; returns its encoding, or None to send only its name.
    Raises WireError when the value is too deep or too large.
    """
    if depth > MOST_DEPTH:
        raise WireError(f"nested more than {MOST_DEPTH} deep")
    kind = type(value)
    if value is None:
        return ["none"]
    if kind is bool:
        return ["bool", value]
    if kind is int:
        digits = hex(value)
        if len(digits) > LONGEST_INT:
            raise WireError(f"an integer of more than {LONGEST_INT} digits")
        return ["int", digits]
    if kind is float:
        return ["float", value.hex()]
    if kind is str:
        if len(value) > LONGEST_TEXT:
            raise WireError(f"a text of more than {LONGEST_TEXT} characters")
        return ["str", value]
    if kind is list or kind is tuple:
        return [
            kind.__name__,
            [encode(entry, blobs, handle, depth + 1) for entry in value],
        ]
    if kind is dict:
        pairs = [
            [
                encode(key, blobs, handle, depth + 1),
                encode(entry, blobs, handle, depth + 1),
            ]
            for key, entry in value.items()
        ]
        return ["dict", pairs]
    tensor = _encode_tensor(value, blobs)
    if tensor is not None:
        return tensor
    return handle(value) or ["opaque", _name(value)]


def _name(value: Any) -> str:
    return f"{type(value).__name__}"[:100]


def _encode_tensor(value: Any, blobs: list[bytes]) -> list[Any] | None:
    import torch

    # A subclass may define an equality of its own: only plain tensors travel as tensors.
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return None
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.device.type != "cpu":
        return ["opaque", f"{value.layout} tensor on {value.device}"]
    if dtype not in DTYPES or value.is_quantized:
        return ["opaque", f"{dtype} tensor"]
    if value.numel() * value.element_size() > MOST_BYTES:
        raise WireError(f"a tensor of {value.numel():,} entries")
    plain = value.detach().resolve_conj().resolve_neg().contiguous()
    raw = plain.flatten().view(torch.uint8).numpy().tobytes()
    blobs.append(raw)
    return ["tensor", dtype, list(value.shape), len(raw), bool(value.requires_grad)]


def decode(
    coded: Any,
    blobs: memoryview,
    handle: Callable[[list[Any]], Any] | None = None,
    wants_grad: list[Any] | None = None,
) -> Any:
    """The value back. Raises WireError on anything that `encode` does not make.

    handle: makes a value of a kind not known here. wants_grad: receives the tensors that required a gradient.
    """
    at = 0

    def one(coded: Any, depth: int) -> Any:
        nonlocal at
        if not isinstance(coded, list) or not coded or depth > MOST_DEPTH:
            raise WireError("no coded value")
        kind, *rest = coded
        if kind == "none" and not rest:
            return None
        if len(rest) == 1:
            (content,) = rest
            if kind == "bool" and type(content) is bool:
                return content
            if kind == "int" and isinstance(content, str):
                if len(content) > LONGEST_INT:
                    raise WireError("an integer too long")
                return int(content, 16)
            if kind == "float" and isinstance(content, str) and len(content) < 50:
                return float.fromhex(content)
            if kind == "str" and isinstance(content, str):
                if len(content) > LONGEST_TEXT:
                    raise WireError("a text too long")
                return content
            if kind in ("list", "tuple") and isinstance(content, list):
                entries = [one(entry, depth + 1) for entry in content]
                return entries if kind == "list" else tuple(entries)
            if kind == "dict" and isinstance(content, list):
                pairs = [[one(part, depth + 1) for part in pair] for pair in content]
                return dict(pairs)
            if kind == "opaque" and isinstance(content, str):
                return Opaque(content[:100])
        if kind == "tensor" and len(rest) == 4:
            tensor, used = _decode_tensor(rest, blobs[at:])
            at += used
            if rest[3] and wants_grad is not None:
                wants_grad.append(tensor)
            return tensor
        if handle is not None:
            if kind == "object" and len(rest) == 3:
                coded = [kind, rest[0], *(one(part, depth + 1) for part in rest[1:])]
            return handle(coded)
        raise WireError("a value of no known kind")

    try:
        value = one(coded, 0)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise WireError(f"no coded value ({type(error).__name__})") from error
    finally:
        del one  # it refers to itself: else the message and its tensors would wait for the garbage collector
    return value


def _decode_tensor(rest: list[Any], blobs: memoryview) -> tuple[Any, int]:
    import torch

    dtype, shape, size, grad = rest
    if (
        dtype not in DTYPES
        or not isinstance(shape, list)
        or len(shape) > 16
        or any(type(n) is not int or not 0 <= n < 2**40 for n in shape)
        or type(size) is not int
        or type(grad) is not bool
    ):
        raise WireError("no tensor")
    kind: torch.dtype = getattr(torch, dtype)
    if math.prod(shape) * kind.itemsize != size or size > len(blobs):
        raise WireError("a tensor whose bytes do not fit its shape")
    if not size:
        return torch.empty(shape, dtype=kind), 0
    raw = bytearray(blobs[:size])
    if kind == torch.bool and raw.strip(b"\0\1"):
        raise WireError("a truth value that is neither")
    return torch.frombuffer(raw, dtype=kind).reshape(shape), size


def pack(message: dict[str, Any], blobs: list[bytes]) -> bytes:
    """One message as bytes. Raises WireError when it is too large."""
    text = json.dumps(message, ensure_ascii=True).encode()
    body = text + b"".join(blobs)
    if len(body) > MOST_BYTES:
        raise WireError(f"a message of {len(body):,} bytes; at most {MOST_BYTES:,}")
    return HEADER.pack(len(body), len(text)) + body


def unpack(header: bytes, body: bytes) -> tuple[dict[str, Any], memoryview]:
    """A message and the bytes of its tensors. Raises WireError on what is no message."""
    size, text = HEADER.unpack(header)
    if size != len(body) or text > size:
        raise WireError("a message of another length than it says")
    try:
        message = json.loads(body[:text])
    except (ValueError, RecursionError) as error:
        raise WireError("no JSON") from error
    if not isinstance(message, dict):
        raise WireError("a message that is no object")
    return message, memoryview(body)[text:]
