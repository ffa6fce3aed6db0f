"""The walls themselves: each is leaned on from inside."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from moe_course.grading import sandbox, wire
from moe_course.grading.sandbox import Limits, Sandbox, SandboxError, WorkerGoneError

LIMITS = Limits()


@pytest.fixture(scope="module")
def worker():
    reason = sandbox.why_not()
    if reason is not None:
        pytest.skip(f"no sandbox here: {reason}")
    with Sandbox(LIMITS, 61_001) as one:
        one.wait_until_ready()
        yield one


def ask(worker, expression, seconds=30):
    """The value of an expression inside."""
    source = f"import os, socket, sys\ndef f():\n    return {expression}\n"
    reply, _ = worker.ask({"do": "cell", "source": source, "number": 1}, [], seconds)
    assert "error" not in reply, reply
    coded = wire.encode(((), {}, []), [])
    message = {"do": "call", "target": "f", "arguments": coded}
    reply, raw = worker.ask(message, [], seconds)
    assert "error" not in reply, reply
    value, _ = wire.decode(reply["value"], raw)
    return value


def fails(worker, statement):
    """The error of a statement inside."""
    reply, _ = worker.ask({"do": "cell", "source": statement, "number": 1}, [], 30)
    assert "error" in reply, f"{statement} went through"
    return reply["error"][0]


def test_no_network_not_even_to_this_machine(worker):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), 2):
            pass  # from outside it is there
        statement = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert fails(worker, statement) in ("ConnectionRefusedError", "OSError")
    assert ask(worker, "[n for _, n in socket.if_nameindex()]") in (["lo"], [])


def test_nobody_without_rights(worker):
    assert ask(worker, "os.getuid()") != 0
    assert ask(worker, "os.geteuid()") != 0
    status = ask(worker, "open('/proc/self/status').read()")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert int(fields["CapBnd"], 16) == 0 or os.geteuid() != 0
    assert fields["NoNewPrivs"].strip() == "1"
    assert fails(worker, "import os; os.setuid(0)") == "PermissionError"


def test_other_processes_are_not_there(worker):
    pids = ask(worker, "[int(p) for p in os.listdir('/proc') if p.isdigit()]")
    assert len(pids) <= 3
    assert os.getpid() not in pids or os.getpid() <= 3


def test_nothing_of_the_machine_to_read(worker):
    for path in (
        "/etc/passwd",
        "/etc/shadow",
        "/home",
        "/var",
        str(Path.cwd() / "moe_course"),
        str(Path.cwd() / "tests"),
    ):
        assert ask(worker, f"os.path.exists({path!r})") is False, path
    names = ask(worker, "sorted(os.listdir('/judge/moe_judge'))")
    assert [n for n in names if n.endswith(".py")] == [
        "calls.py",
        "interpreter.py",
        "trace.py",
        "wire.py",
        "worker.py",
    ]
    variables = ask(worker, "dict(os.environ)")
    assert set(variables) <= {
        *("PATH", "HOME", "LANG", "PYTHONPATH", "PWD", "MPLBACKEND", "LC_CTYPE"),
        "TRITON_INTERPRET",
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
        *("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONSAFEPATH"),
        *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR"),
    }


def test_nowhere_to_write_but_a_small_tmp(worker):
    for folder in ("/", "/usr", "/judge", "/judge/moe_judge", "/proc", "/bin", "/lib"):
        statement = f"open('{folder}/x', 'w')"
        assert fails(worker, statement) in (
            "OSError",
            "PermissionError",
            "FileNotFoundError",
        )
    assert fails(worker, "open('/tmp/a', 'wb').write(bytes(100 * 2**20))") == "OSError"
    many = "for i in range(200): open(f'/tmp/{i}', 'wb').write(bytes(2**20))"
    assert fails(worker, many) == "OSError"
    assert (
        ask(
            worker,
            "sum(os.path.getsize(f'/tmp/{n}') for n in os.listdir('/tmp') if os.path.isfile(f'/tmp/{n}'))",
        )
        <= LIMITS.disk_bytes
    )
    ask(
        worker,
        "[os.remove(f'/tmp/{n}') for n in os.listdir('/tmp') if os.path.isfile(f'/tmp/{n}')]",
    )


def test_processes_and_threads_are_bounded(worker):
    threads = "import threading, time\nfor _ in range(200): threading.Thread(target=time.sleep, args=(3,), daemon=True).start()"
    assert fails(worker, threads) == "RuntimeError"
    time.sleep(4)
    forks = "import os, time\nfor _ in range(200):\n    if not os.fork():\n        time.sleep(3); os._exit(0)"
    assert fails(worker, forks) == "BlockingIOError"


def test_a_hostile_sibling_changes_nothing(worker):
    ask(worker, "open('/tmp/mine', 'w').write('secret')")
    with Sandbox(LIMITS, 61_002) as enemy:
        enemy.wait_until_ready()
        attack = (
            "import os\n"
            "for pid in range(2, 70000):\n"
            "    if pid != os.getpid():\n"
            "        try: os.kill(pid, 9)\n"
            "        except OSError: pass\n"
        )
        reply, _ = enemy.ask({"do": "cell", "source": attack, "number": 1}, [], 60)
        assert "error" not in reply
        assert "mine" not in ask(enemy, "os.listdir('/tmp')")
    assert ask(worker, "open('/tmp/mine').read()") == "secret"


def test_two_workers_at_a_time_have_bounds_of_their_own():
    with Sandbox(LIMITS, 61_003) as one, Sandbox(LIMITS, 61_004) as two:
        for each in (one, two):
            each.wait_until_ready()
        threads = "import threading, time\nt = [threading.Thread(target=time.sleep, args=(20,), daemon=True) for _ in range(30)]\nfor x in t: x.start()"
        for each in (one, two):
            reply, _ = each.ask({"do": "cell", "source": threads, "number": 1}, [], 30)
            assert "error" not in reply, reply


def test_closing_ends_every_process_and_frees_every_descriptor():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        with Sandbox(LIMITS, 61_005) as one:
            one.wait_until_ready()
            spawn = "import subprocess\nsubprocess.Popen(['sleep', '4321'], start_new_session=True)"
            one.ask({"do": "cell", "source": spawn, "number": 1}, [], 30)
            inside = sandbox.descendants(one.process.pid)
            assert len(inside) >= 2
    assert descriptors() == before
    assert threading.active_count() == threads
    assert not [p for p in inside if Path(f"/proc/{p}").exists()]


def test_a_worker_that_does_not_come_up_says_what_was_said(monkeypatch):
    monkeypatch.setattr(
        sandbox, "command", lambda *_: ["sh", "-c", "echo no namespaces >&2; exit 1"]
    )
    with pytest.raises(SandboxError, match="no namespaces"):
        Sandbox(LIMITS).wait_until_ready()
    assert "no namespaces" in sandbox.why_not()
    monkeypatch.setattr(sandbox, "command", lambda *_: ["sleep", "60"])
    with pytest.raises(SandboxError, match="longer than allowed"):
        Sandbox(Limits(start_seconds=0.3)).wait_until_ready()


def test_what_the_sandbox_needs_is_named(monkeypatch):
    monkeypatch.setattr(
        sandbox.shutil, "which", lambda name: None if name == "bwrap" else "/bin/x"
    )
    assert "install bubblewrap" in sandbox.why_not()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert "needs Linux" in sandbox.why_not()


def test_a_silent_worker_is_stopped_in_time(worker):
    with Sandbox(LIMITS, 61_006) as one:
        one.wait_until_ready()
        begin = time.monotonic()
        with pytest.raises(WorkerGoneError, match="longer than allowed"):
            one.ask({"do": "cell", "source": "while True: pass", "number": 1}, [], 1)
        assert time.monotonic() - begin < 5
        assert one.process.poll() is not None
