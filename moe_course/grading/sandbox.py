"""A process without network, privileges or the rest of the machine, in which a submission runs.

bubblewrap gives it namespaces of its own and a read-only view of Python alone; prlimit bounds its memory, processors,
files and processes; the judge kills it, with all its descendants, when it takes too long or too much memory together.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_course.grading import wire

NOBODY = 65_534
HERE = Path(__file__).parent
# All that a submission can see of this package.
INSIDE = [HERE / name for name in ("calls.py", "interpreter.py", "wire.py", "worker.py")]  # fmt: skip
INSIDE += [HERE.parent / "kernels" / "trace.py"]


@dataclass(frozen=True)
class Limits:
    """What a submission may use."""

    start_seconds: float = 60.0  # until Python and torch are imported
    cell_seconds: float = 30.0
    call_seconds: float = 20.0
    whole_seconds: float = 300.0
    memory_bytes: int = 3 * 2**30  # of all its processes together
    address_bytes: int = 12 * 2**30  # of one process, most of it never touched
    disk_bytes: int = 64 * 2**20  # of its /tmp and of each file
    processes: int = 48  # and threads


class SandboxError(RuntimeError):
    """No sandbox can be had on this machine; the text says why."""


class WorkerGoneError(RuntimeError):
    """The worker was stopped or ended by itself; `reason` says how, in words for the learner."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _readable() -> list[str]:
    """Arguments that show the sandbox Python and its libraries, and nothing else of this machine."""
    show: list[str] = []
    for name in ("/lib", "/lib32", "/lib64", "/libx32", "/bin"):
        path = Path(name)
        if path.is_symlink():
            show += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            show += ["--ro-bind", name, name]
    show += ["--ro-bind", "/usr", "/usr"]
    for extra in ("/etc/ld.so.cache", "/etc/alternatives"):
        if Path(extra).exists():
            show += ["--ro-bind", extra, extra]
    prefixes = {Path(p).resolve() for p in (sys.prefix, sys.base_prefix)}
    for prefix in sorted(prefixes):
        if not prefix.is_relative_to("/usr"):
            # bubblewrap makes folders on the way for root alone.
            for above in reversed(prefix.parents[:-1]):
                show += ["--perms", "0755", "--dir", str(above)]
            show += ["--ro-bind", str(prefix), str(prefix)]
    # An installed copy of this package is an answer to its exercises.
    for key in ("purelib", "platlib"):
        installed = Path(sysconfig.get_path(key), "moe_course")
        if installed.is_dir():
            show += ["--tmpfs", str(installed)]
    return show


def command(limits: Limits, user: int | None = None) -> list[str]:
    """The command that starts a worker in a sandbox. Raises SandboxError where a program is missing."""
    for program, package in (
        ("bwrap", "bubblewrap"),
        ("prlimit", "util-linux"),
        ("setpriv", "util-linux"),
    ):
        if shutil.which(program) is None:
            raise SandboxError(
                f"the sandbox needs {program}: install {package} (Linux only)"
            )
    # A judge that is root drops to a user of its own for each worker: limits on processes do not bind root.
    root = os.geteuid() == 0
    user = NOBODY if user is None else user
    spaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    spaces += ["--unshare-cgroup-try"]
    if not root:
        spaces += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    arguments = ["bwrap", *spaces, "--die-with-parent", "--new-session", "--clearenv"]
    # First /tmp: the environment may lie below it.
    size = ["--perms", "1777", "--size", str(limits.disk_bytes)]
    arguments += [
        *size,
        "--tmpfs",
        "/tmp",
        *_readable(),
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]
    for folder in ("/judge", "/judge/moe_judge"):
        arguments += ["--perms", "0755", "--dir", folder]
    for path in INSIDE:
        arguments += ["--ro-bind", str(path), f"/judge/moe_judge/{path.name}"]
    arguments += ["--remount-ro", "/", "--chdir", "/tmp", "--hostname", "sandbox"]
    settings = {
        "PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONPATH": "/judge",
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1",
        "MPLBACKEND": "agg", "TRITON_INTERPRET": "1",
    }  # fmt: skip
    for name, value in settings.items():
        arguments += ["--setenv", name, value]
    arguments.append("--")
    if root:
        who = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
        arguments += ["setpriv", *who, "--no-new-privs", "--bounding-set", "-all"]
        arguments += ["--inh-caps", "-all", "--"]
    arguments += [
        "prlimit",
        f"--as={limits.address_bytes}",
        f"--fsize={limits.disk_bytes}",
        f"--nproc={limits.processes}",
        "--nofile=256",
        "--core=0",
        f"--cpu={int(2 * limits.whole_seconds) + 60}",
        "--",
    ]
    return [*arguments, sys.executable, "-m", "moe_judge.worker"]


def unsafe_command() -> list[str]:
    """The same worker without a sandbox."""
    return [sys.executable, "-m", "moe_judge.worker"]


class Sandbox:
    """One worker, from its start to its end. Every way out kills it and all its descendants."""

    def __init__(
        self, limits: Limits, user: int | None = None, unsafe: bool = False
    ) -> None:
        self.limits = limits
        self._files: Any = None
        environment = None
        if unsafe:
            self._files = _judge_folder()
            environment = {**os.environ, "PYTHONPATH": self._files.name}
            environment["TRITON_INTERPRET"] = "1"
        self.process = subprocess.Popen(
            unsafe_command() if unsafe else command(limits, user),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self.ready = False
        self._sent = 0

    def wait_until_ready(self) -> None:
        """Raises SandboxError, with what bubblewrap said, when no worker comes up."""
        if self.ready:
            return
        try:
            message, _ = self._receive(time.monotonic() + self.limits.start_seconds)
        except (WorkerGoneError, wire.WireError) as error:
            said = self._last_words()
            self.close()
            raise SandboxError(said or str(error)) from error
        self.ready = bool(message.get("ready"))

    def _last_words(self) -> str:
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        words = self.process.stderr.read(4000) or b""
        return words.decode(errors="replace").strip()[-500:]

    # --- Messages ---

    def ask(
        self,
        message: dict[str, Any],
        blobs: list[bytes],
        seconds: float,
        callback: Any = None,
    ) -> tuple[dict[str, Any], memoryview]:
        """Send a message and wait for its reply; callbacks are answered on the way.

        Raises WorkerGoneError when none comes in time, the worker ends or talks nonsense: it is then killed.
        """
        self._sent += 1
        deadline = time.monotonic() + seconds
        try:
            self._send(wire.pack(message | {"id": self._sent}, blobs), deadline)
            while True:
                reply, raw = self._receive(deadline)
                if "callback" in reply and callback is not None:
                    answer, out = callback(reply, raw)
                    self._send(wire.pack(answer, out), deadline)
                elif reply.get("id") == self._sent:
                    return reply, raw
                else:
                    raise wire.WireError("a reply to no question")
        except wire.WireError as error:
            self.close()
            raise WorkerGoneError(
                f"the process of this submission sent {error}; it was stopped"
            ) from error
        except WorkerGoneError:
            self.close()
            raise

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait([], [self._to], deadline)
            try:
                view = view[os.write(self._to, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerGoneError(self._how_it_ended()) from error

    def _receive(self, deadline: float) -> tuple[dict[str, Any], memoryview]:
        header = self._read(wire.HEADER.size, deadline)
        size, text = wire.HEADER.unpack(header)
        if size > wire.MOST_BYTES or text > size:
            raise wire.WireError(f"a message of {size:,} bytes")
        return wire.unpack(header, self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait([self._from], [], deadline)
            try:
                part = os.read(self._from, min(size - len(parts), 2**20))
            except BlockingIOError:
                continue
            if not part:
                raise WorkerGoneError(self._how_it_ended())
            parts += part
        return bytes(parts)

    def _wait(self, reading: list[int], writing: list[int], deadline: float) -> None:
        """Until one of them is ready. The memory of all processes inside is looked at meanwhile."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerGoneError("ran longer than allowed and was stopped")
            if any(select.select(reading, writing, [], min(left, 0.1))[:2]):
                return
            most = self.limits.memory_bytes
            if memory_of(descendants(self.process.pid), most) > most:
                raise WorkerGoneError(
                    f"used more than {self.limits.memory_bytes / 2**30:.1f} GiB of memory and was stopped"
                )

    def _how_it_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        code = self.process.returncode
        if code is not None and code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return "the process was killed"
        return "ended the process that it runs in"

    def close(self) -> None:
        """Kill the worker, with every process that it started, and free what it held here."""
        inside = descendants(self.process.pid)
        _kill(inside)
        # bubblewrap itself last: what it started would be left for the machine's first process to bury.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
        _kill([self.process.pid])
        self.process.wait()
        # The kernel takes a moment to end a namespace with all in it.
        patience = time.monotonic() + 5
        while time.monotonic() < patience and any(map(runs, inside)):
            time.sleep(0.005)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _judge_folder() -> Any:
    from tempfile import TemporaryDirectory

    folder = TemporaryDirectory(prefix="moe-judge-")
    package = Path(folder.name, "moe_judge")
    package.mkdir()
    for path in INSIDE:
        shutil.copy(path, package / path.name)
    return folder


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended (a zombie has: it waits to be buried)."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes below a process, those of its namespaces included."""
    found, todo = [], [pid]
    while todo:
        try:
            for task in Path(f"/proc/{todo.pop()}/task").iterdir():
                children = [int(c) for c in (task / "children").read_text().split()]
                found += children
                todo += children
        except OSError:
            continue
    return found


def memory_of(pids: list[int], most: int = 0) -> int:
    """Bytes of memory that these processes hold together.

    The quick count takes what forks share for each anew; above `most` it is counted again, exactly, which takes longer.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    each: dict[int, int] = {}
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            each[pid] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
    if sum(each.values()) > most:
        for pid in each:
            # A shared page counts as its part (Pss); unreadable, the quick count stands.
            with suppress(OSError, ValueError, IndexError, StopIteration):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                pss = next(line for line in lines if line.startswith("Pss:"))
                each[pid] = 1024 * int(pss.split()[1])
    return sum(each.values())


def why_not() -> str | None:
    """Why there is no sandbox on this machine, or None where there is one."""
    if not sys.platform.startswith("linux"):
        return "the sandbox needs Linux and bubblewrap"
    try:
        with Sandbox(Limits()) as sandbox:
            sandbox.wait_until_ready()
    except SandboxError as error:
        return str(error)
    return None
