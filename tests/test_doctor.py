"""`moe-course doctor`: one line a finding, a remedy under each that failed."""

from __future__ import annotations

import importlib.util
import subprocess
from importlib import metadata
from types import SimpleNamespace

import pytest

from moe_course import cli, doctor


def _report(capsys) -> tuple[int, list[str]]:
    code = cli.main(["doctor"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out.splitlines()


def _failures(lines: list[str]) -> dict[str, str]:
    """What failed, with its remedy. Every line must be a finding or the remedy of the failure above it."""
    failed = {}
    for above, line in zip(["", *lines], [*lines, ""], strict=True):
        if above.startswith("[FAIL] "):
            assert line.startswith("       to mend it: ")
            assert len(line) > len("       to mend it: ") + 5
            failed[above.removeprefix("[FAIL] ")] = line.strip()
        else:
            assert line.startswith(("[OK] ", "[FAIL] ")) or line == "", line
    return failed


def test_every_finding_is_a_line_and_the_exit_code_says_whether_one_failed(capsys):
    code, lines = _report(capsys)
    failed = _failures(lines)
    assert len([line for line in lines if line.startswith("[")]) == 8
    assert code == bool(failed)


def test_all_is_well_here(capsys):
    code, lines = _report(capsys)
    failed = _failures(lines)
    if failed:
        pytest.skip(f"this machine lacks something: {'; '.join(failed)}")
    assert code == 0


@pytest.fixture
def no_programs(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)


def test_missing_programs_fail_with_a_remedy(capsys, no_programs):
    code, lines = _report(capsys)
    failed = _failures(lines)
    assert code == 1
    assert (
        "apt-get install chromium (not needed"
        in failed["no Chromium: the tests of the built pages are skipped"]
    )
    assert (
        "apt-get install bubblewrap (not needed"
        in failed["sandbox: bubblewrap is not installed"]
    )


def test_missing_packages_fail_with_a_remedy(capsys, monkeypatch):
    find, version = importlib.util.find_spec, metadata.version

    def no_version(name):
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    hidden = ("torch", "ipykernel")
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name: None if name in hidden else find(name),
    )
    monkeypatch.setattr(doctor.metadata, "version", no_version)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    code, lines = _report(capsys)
    failed = _failures(lines)
    assert code == 1
    assert "pip install" in failed["torch is not installed"]
    assert "pip install" in failed["triton is not installed"]
    assert "ipykernel install" in failed["the Jupyter kernel is not installed"]
    assert "[OK] CUDA: not looked for without torch" in lines


def test_triton_is_not_missed_where_there_is_no_build_of_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    assert doctor._triton().ok


def test_a_full_disk_and_an_old_python_fail(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e9)
    )
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 2))
    code, lines = _report(capsys)
    failed = _failures(lines)
    assert code == 1
    assert failed["disk: 2 GB free"] == "to mend it: free at least 5 GB"
    assert any(
        "3.11" in remedy for what, remedy in failed.items() if what.startswith("python")
    )


def test_a_sandbox_that_is_there_but_does_not_start_fails(monkeypatch):
    refused = subprocess.CompletedProcess(
        [], 1, "", "bwrap: setting up uid map: Permission denied"
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/bwrap")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: refused)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert "uid map: Permission denied" in doctor.sandbox_error()
    finding = doctor._sandbox()
    assert not finding.ok
    assert "apparmor_restrict_unprivileged_userns" in finding.remedy


def test_a_kernel_of_another_python_fails(monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    for argv, ok in (
        (["python"], True),
        ([doctor.sys.executable], True),
        (["/opt/other/bin/python"], False),
    ):
        spec = SimpleNamespace(argv=argv)
        monkeypatch.setattr(
            KernelSpecManager, "get_kernel_spec", lambda self, name, spec=spec: spec
        )
        assert doctor._kernel().ok is ok


def test_a_check_that_crashes_is_a_failed_line(capsys, monkeypatch):
    def broken(path):
        raise OSError("stale file handle")

    monkeypatch.setattr(doctor.shutil, "disk_usage", broken)
    code, lines = _report(capsys)
    assert code == 1
    assert "disk: OSError: stale file handle" in _failures(lines)
