"""`moe-course doctor`: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

FREE_GB = 5  # GB: the environment takes about 3, a build less than 1


class Finding(NamedTuple):
    ok: bool
    what: str
    remedy: str = ""
    needed: bool = True  # False: some part of the course runs without it, and says so


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(
        ok, f"python {platform.python_version()}", "install Python 3.11 or newer"
    )


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(
            False,
            "torch is not installed",
            "make book, or pip install -c constraints.txt 'moe_course[dev]'",
        )
    import torch

    return Finding(bool(torch.ones(2).sum() == 2), f"torch {torch.__version__}")


def _triton() -> Finding:
    version = _version("triton")
    if version:
        return Finding(True, f"triton {version}")
    if sys.platform != "linux":
        return Finding(
            True,
            f"triton: no build for {platform.system()}; the kernel part skips its code and says so",
        )
    return Finding(
        False, "triton is not installed", "pip install -c constraints.txt triton"
    )


def _cuda() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(True, "CUDA: not looked for without torch")
    import torch

    if torch.cuda.is_available():
        return Finding(
            True, f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
        )
    return Finding(
        True,
        "CUDA: no GPU here; everything runs on the CPU, GPU figures are shown as recorded",
    )


def _kernel() -> Finding:
    remedy = "python -m pip install ipykernel, then python -m ipykernel install --sys-prefix --name python3"
    if (
        importlib.util.find_spec("jupyter_client") is None
        or importlib.util.find_spec("ipykernel") is None
    ):
        return Finding(False, "the Jupyter kernel is not installed", remedy)
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        python = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Finding(False, "there is no kernel named python3", remedy)
    # Jupyter starts a bare "python" as the interpreter that it runs under itself.
    bare = python in ("python", "python3", "python{}.{}".format(*sys.version_info))
    ok = bare or os.path.abspath(python) == os.path.abspath(sys.executable)
    return Finding(
        ok, f"kernel python3 runs {sys.executable if bare else python}", remedy
    )


def chromium() -> str | None:
    """Path of a Chromium-like browser, for the tests of the built pages."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    return None


def _chromium() -> Finding:
    path = chromium()
    if path is None:
        remedy = "Debian, Ubuntu: apt-get install chromium"
        return Finding(
            False,
            "no Chromium: the tests of the built pages are skipped",
            remedy,
            needed=False,
        )
    done = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    return Finding(
        done.returncode == 0,
        done.stdout.strip() or f"{path} does not start",
        "reinstall Chromium",
    )


def sandbox_error() -> str:
    """Why bubblewrap cannot start a process without network and privileges here; empty when it can."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bubblewrap is not installed"
    words = [
        bwrap,
        "--unshare-all",
        "--die-with-parent",
        "--ro-bind",
        "/",
        "/",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]
    try:
        done = subprocess.run(
            [*words, "true"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not start ({error})"
    return (
        ""
        if done.returncode == 0
        else f"bubblewrap does not start ({done.stderr.strip()[:160]})"
    )


def _sandbox() -> Finding:
    error = sandbox_error()
    if not error:
        return Finding(True, "sandbox: bubblewrap starts an isolated process")
    if sys.platform != "linux":
        remedy = "grading others' work needs Linux; your own needs no sandbox"
    elif "not installed" in error:
        remedy = "Debian, Ubuntu: apt-get install bubblewrap"
    else:
        remedy = (
            "allow unprivileged user namespaces (Ubuntu 24.04: "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap)"
        )
    return Finding(False, f"sandbox: {error}", remedy, needed=False)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding(
        free >= FREE_GB, f"disk: {free:.0f} GB free", f"free at least {FREE_GB} GB"
    )


def findings() -> Iterator[Finding]:
    checks: tuple[Callable[[], Finding], ...] = (
        _python, _torch, _triton, _cuda, _kernel, _chromium, _sandbox, _disk,
    )  # fmt: skip
    for check in checks:
        try:
            yield check()
        except Exception as error:
            name = check.__name__.strip("_")
            yield Finding(
                False,
                f"{name}: {type(error).__name__}: {error}",
                "report this with the lines above",
            )


def report() -> int:
    """Print one line a finding; 1 when any failed."""
    failed = False
    for finding in findings():
        print(f"[{'OK' if finding.ok else 'FAIL'}] {finding.what}")
        if not finding.ok:
            failed = True
            print(
                f"       to mend it: {finding.remedy}"
                + ("" if finding.needed else " (not needed to read or solve)")
            )
    return int(failed)
