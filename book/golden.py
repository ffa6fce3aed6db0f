"""Refresh the golden outputs: run every notebook of the book, keep the outputs of the cells tagged
`nbval-check-output`, clear all others.

    python book/golden.py [NOTEBOOK ...]

Read the difference before committing: a golden output that changes is a claim that changes.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

GOLDEN = "nbval-check-output"


def refresh(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=120,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop(
            "execution", None
        )  # time stamps: different on every run
        if GOLDEN not in cell.metadata.get("tags", ()):
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.get("language_info", {}).pop("version", None)
    notebook.metadata["language_info"] = {"name": "python"}
    path.write_text(
        nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n"
    )


if __name__ == "__main__":
    root = Path(__file__).parent
    for notebook_path in [Path(name) for name in sys.argv[1:]] or sorted(
        root.rglob("*.ipynb")
    ):
        refresh(notebook_path)
        print(notebook_path)
