"""Recorded measurements: a figure that was not computed on the spot says where it comes from.

A record is one JSON file: what was run, on which device, with which versions, when, from which revision, and the
rows it produced. A chapter that shows one prints `record.provenance()` beside it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("data")  # comes with the package
FOLDER = DATA / "records"


@dataclass(frozen=True)
class Record:
    """One measurement with its provenance. `rows` are flat dicts; every key names its unit, as in `time_ms`."""

    name: str
    command: str
    device: str
    versions: dict[str, str]
    date: str  # UTC, ISO 8601, to the minute
    revision: str  # git revision; "+changes" where files differed from it
    rows: list[dict[str, Any]]

    def provenance(self) -> str:
        """The line that stands beside every figure drawn from this record."""
        versions = ", ".join(
            f"{name} {version}" for name, version in self.versions.items()
        )
        return (
            f"Recorded on {self.date[:10]} on {self.device} with {versions} by `{self.command}` "
            f"at revision {self.revision}."
        )


def _revision(folder: Path) -> str:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown (no git checkout)"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name() -> str:
    """The GPU that torch would use, else the CPU with its number of cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{_cpu()} ({os.cpu_count()} cores)"


def measure(
    name: str,
    command: str,
    rows: list[dict[str, Any]],
    packages: tuple[str, ...] = ("torch",),
) -> Record:
    """A record of `rows`, measured just now on this machine. Raises ValueError when there are no rows."""
    if not rows:
        raise ValueError(
            f"record {name!r} has no rows: a measurement that produced nothing is not recorded"
        )
    versions = {"python": platform.python_version()}
    for package in packages:
        versions[package] = metadata.version(package)
    now = datetime.now(UTC).isoformat(timespec="minutes")
    return Record(
        name, command, device_name(), versions, now, _revision(Path.cwd()), rows
    )


def save(record: Record, path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    write_json(asdict(record), path)


def write_json(content: Any, path: Path) -> None:
    """Write JSON to a file, whole or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps(content, indent=1, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def path_of(record: str | Path) -> Path:
    """The file of a record: of one that comes with the package by its name, of others by their path."""
    return FOLDER / f"{record}.json" if isinstance(record, str) else record


def load(record: str | Path) -> Record:
    """Read a record, by name or from a file. Raises ValueError that names what is missing from the file."""
    path = path_of(record)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no record: not JSON ({error})") from error
    expected = {field.name for field in fields(Record)}
    if not isinstance(raw, dict) or set(raw) != expected:
        missing = expected - set(raw) if isinstance(raw, dict) else expected
        raise ValueError(
            f"{path} is no record: it lacks {', '.join(sorted(missing)) or 'nothing, but has more'}"
        )
    return Record(**raw)


def load_if_measured(record: str | Path) -> Record | None:
    """The record, or None where nobody has measured it yet, so that a page can say so."""
    return load(record) if path_of(record).exists() else None
