"""A notebook that a reader downloads from a page runs on its own, with nothing but the package installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def notebooks():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [toc["root"]]
    pages += [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [p for p in pages if (ROOT / f"{p}.ipynb").exists()]


@pytest.mark.parametrize("page", notebooks())
def test_no_cell_reads_a_file_of_the_repository(page):
    """What a chapter reads comes with the package: `records.load("name")`, `records.DATA`."""
    notebook = nbformat.read(ROOT / f"{page}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found = re.search(
                r"""["'](\.\./(?!\{)[\w./]*\.\w+|book/[\w./]+)["']""", cell.source
            )
            assert not found, f"{page}, cell {cell.id}: {found[1]}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the package as a wheel installs it, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "moe_course", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in listed:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    site = folder / "site"
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(site), str(source)], check=True
    )
    shutil.rmtree(source)
    return site


QUICK = ["book/intro", "book/finetuning/lora", "book/reference/claims"]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=() if p in QUICK else pytest.mark.thorough)
        for p in notebooks()
        if not p.startswith("exercises/")  # those stop at the first empty answer
    ],
)
def test_a_downloaded_notebook_runs_on_its_own(page, installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    notebook = nbformat.read(ROOT / f"{page}.ipynb", as_version=4)
    seen = nbformat.v4.new_code_cell("import moe_course; print(moe_course.__file__)")
    notebook.cells.append(seen)
    NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert str(installed) in seen.outputs[0].text
