"""Build the book: `python book/build.py` executes the chapters and writes _build/html.

A chapter runs again exactly when something it depends on has changed: its own code, the moe_course modules it imports
(followed through their imports), data, the pinned or installed versions, or Python. Its pages are rendered again when
anything shown on them has. When nothing has changed at all, nothing is done. All of this is decided by contents, never
by dates, and kept in _build/book.json.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import nbformat
import yaml
from filelock import FileLock
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_cache import get_cache

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import playground  # noqa: E402

BUILD = ROOT / "_build"
HTML, DOCTREES, OUTPUTS = (
    BUILD / "html",
    BUILD / ".doctrees",
    BUILD / "jupyter_execute",
)
STATE, LOG = BUILD / "book.json", BUILD / "build.log"

# All that the book is made from (plus whatever a page includes from elsewhere, which book/_ext/course.py reports).
INPUTS = [
    "_config.yml",
    "_toc.yml",
    "constraints.txt",
    "book",
    "exercises",
    "moe_course",
]
# What shapes pages but cannot change a cell's output.
FRAME = re.compile(
    r"_config\.yml|_toc\.yml|[^/]+\.(md|cff)|moe_course/data/quizzes\.yaml|book/_ext/.*|book/_static/.*|.*\.bib"
)
# Calls that hide from the imports what a chapter runs: such a chapter depends on the whole package.
HIDDEN = {
    "import_module",
    "exec_module",
    "run_module",
    "run_path",
    "run_cell_magic",
    "system",
    "getoutput",
    "Popen",
}
HIDDEN_NAMES = HIDDEN | {"__import__", "exec", "eval", "subprocess", "runpy"}


def main() -> int:
    BUILD.mkdir(exist_ok=True)
    with FileLock(BUILD / ".lock"):
        return build()


def build() -> int:
    started = time.perf_counter()
    pages = toc_pages()
    missing = (
        playground.prepare(BUILD) if f"{playground.PAGE}.md" in pages else ""
    )
    old = json.loads(STATE.read_text()) if STATE.exists() else {}
    included = old.get("includes", [])
    new = {
        "versions": versions(),
        "files": digests([*pages, *included]),
        "includes": included,
        "missing": missing,
    }
    if (
        old.get("complete")
        and (HTML / "index.html").exists()
        and all(old.get(key) == new[key] for key in new)
    ):
        print("The book is up to date.")
        return report(missing)

    notebooks = [
        page
        for page in pages
        if page.endswith(".ipynb") and not page.startswith("exercises/")
    ]
    new["notebooks"] = {
        notebook: fingerprint(notebook, new, pages) for notebook in notebooks
    }
    forget_outputs(old, new)
    forget_pages(old, new, pages)
    STATE.write_text(json.dumps(new | {"complete": False}))

    ok = run_jupyter_book(waiting=uncached(notebooks))
    if not ok:  # Sphinx repeats no warning for a page it has already read, so the next build must read all again
        shutil.rmtree(DOCTREES, ignore_errors=True)
        return 1
    new["includes"] = includes()
    new["files"] |= digests(new["includes"])
    STATE.write_text(json.dumps(new | {"complete": True}))
    print(f"Built {len(pages)} pages in {time.perf_counter() - started:.0f} s.")
    return report(missing)


def report(missing: str) -> int:
    if find_spec("triton") is None:
        print(
            "There is no triton here (it exists for Linux alone): book/kernels is shown without outputs."
        )
    if missing:
        print(f"The playground does not run in this copy. {missing}")
    print(
        "Open _build/html/index.html, or serve it: python -m http.server -d _build/html (make serve)"
    )
    return 0


# ---------------------------------------------------------------------------------------------------------------
# What has changed


def versions() -> str:
    """Python and every installed distribution."""
    installed = sorted(
        {
            f"{d.metadata['Name']}=={d.version}"
            for d in importlib.metadata.distributions()
        }
    )
    return sha("\n".join([sys.version, *installed]).encode())


def digests(more: list[str]) -> dict[str, str]:
    """The contents of every input file, by path from the root."""
    files = [file for name in [*INPUTS, *more] for file in walk(ROOT / name)]
    return {
        file.relative_to(ROOT).as_posix(): sha(file.read_bytes())
        for file in sorted(set(files))
    }


def walk(path: Path):
    if (
        path.name.startswith(".")
        or path.name == "__pycache__"
        or path.suffix == ".pyc"
    ):
        return
    if path.is_dir():
        for child in path.iterdir():
            yield from walk(child)
    elif path.is_file():
        yield path


def toc_pages() -> list[str]:
    """The source files named in _toc.yml."""
    found = []

    def visit(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("file", "root"):
                    found.append(source_of(value))
                else:
                    visit(value)
        elif isinstance(node, list):
            for child in node:
                visit(child)

    visit(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8")))
    return found


def source_of(page: str) -> str:
    for suffix in ("", ".ipynb", ".md"):
        if (ROOT / (page + suffix)).is_file():
            return page + suffix
    sys.exit(
        f"_toc.yml names {page}, but there is no {page}.ipynb or {page}.md"
    )


def fingerprint(notebook: str, new: dict, pages: list[str]) -> str:
    """What the outputs of a notebook depend on, apart from its own code (which the execution cache compares)."""
    modules = imported_modules(ROOT / notebook)
    relevant = [
        f"{path} {digest}"
        for path, digest in new["files"].items()
        if path not in pages
        and not FRAME.fullmatch(path)
        and (
            modules is None
            or not re.fullmatch(r"moe_course/.*\.py", path)
            or path in modules
        )
    ]
    return sha("\n".join([new["versions"], *relevant]).encode())


def imported_modules(start: Path) -> set[str] | None:
    """The files of moe_course that a notebook imports, directly or not; None when that can't be read off."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        path = todo.pop()
        names = imports(path)
        if names is None:
            return None
        for name in names:
            parts = name.split(".")
            for end in range(
                1, len(parts) + 1
            ):  # importing a.b.c runs a/__init__ and a/b/__init__ as well
                stem = Path(*parts[:end])
                for file in (stem / "__init__.py", stem.with_suffix(".py")):
                    if file.as_posix() not in seen and (ROOT / file).is_file():
                        seen.add(file.as_posix())
                        todo.append(ROOT / file)
    return seen


def imports(path: Path) -> set[str] | None:
    """Dotted names below moe_course that a file may import, or None when it runs code that its imports don't show."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(
            TransformerManager().transform_cell(c.source)
            for c in cells
            if c.cell_type == "code"
        )
        package: list[str] = []
    else:
        code = path.read_text(encoding="utf8")
        package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    names: set[str] = set()
    hidden = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            hidden |= bool(HIDDEN_NAMES & {alias.name for alias in node.names})
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                package[: len(package) - node.level + 1] if node.level else []
            )
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {
                f"{module}.{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.Attribute):
            hidden |= node.attr in HIDDEN
        elif isinstance(node, ast.Name):
            hidden |= node.id in HIDDEN_NAMES
        elif isinstance(node, ast.Constant) and path.suffix == ".ipynb":
            hidden |= node.value == "run"  # perhaps the magic %run
    return (
        None
        if hidden
        else {name for name in names if name.split(".")[0] == "moe_course"}
    )


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Forgetting what is out of date


def forget_outputs(old: dict, new: dict) -> None:
    """Remove the outputs of every notebook whose dependencies changed (and of notebooks that are gone)."""
    kept = {
        name
        for name, value in new["notebooks"].items()
        if old.get("notebooks", {}).get(name) == value
    }
    cache = get_cache(BUILD / ".jupyter_cache")
    for record in cache.list_cache_records():
        if Path(record.uri) not in {ROOT / name for name in kept}:
            cache.remove_cache(record.pk)


def forget_pages(old: dict, new: dict, pages: list[str]) -> None:
    """Remove the parsed form of what changed. The HTML is always written anew: every page shows the sidebar."""
    before, after = old.get("files", {}), new["files"]
    changed = {
        path for path in before | after if before.get(path) != after.get(path)
    }
    shutil.rmtree(HTML, ignore_errors=True)
    if (
        not old.get("complete")
        or old["versions"] != new["versions"]
        or changed - set(pages)
    ):
        shutil.rmtree(DOCTREES, ignore_errors=True)
        shutil.rmtree(OUTPUTS, ignore_errors=True)
    for page in changed & set(pages):
        (DOCTREES / page).with_suffix(".doctree").unlink(missing_ok=True)


def uncached(notebooks: list[str]) -> int:
    """How many notebooks will be executed."""
    cache = get_cache(BUILD / ".jupyter_cache")
    missing = 0
    for path in notebooks:
        notebook = nbformat.read(ROOT / path, as_version=4)
        if "kernelspec" in notebook.metadata:
            notebook.metadata.kernelspec.name = (
                "python3"  # as _config.yml makes it
            )
        try:
            cache.match_cache_notebook(notebook)
        except KeyError:
            missing += 1
    return missing


def includes() -> list[str]:
    """Files of this repository that a page includes, as the last build saw them."""
    return [
        path
        for path in json.loads((DOCTREES / "includes.json").read_text())
        if not path.startswith((".", "_build"))
    ]


# ---------------------------------------------------------------------------------------------------------------
# Running Jupyter Book


def run_jupyter_book(waiting: int) -> bool:
    """Run it with one line for each notebook executed; on failure show what went wrong."""
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
    ]
    command += ["build", str(ROOT), "-n", "-W", "--keep-going"]
    done, lines, begun = 0, [], None
    with (
        LOG.open("w", encoding="utf8") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf8",
            errors="replace",
        ) as process,
    ):
        for line in process.stdout:
            line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)
            log.write(line)
            lines.append(line.rstrip("\n"))
            if match := re.match(
                r"(.*)\.ipynb: Executing notebook using", line
            ):
                done += 1
                begun = time.perf_counter()
                name = Path(match[1]).relative_to(ROOT).as_posix()
                print(
                    f"[{done}/{max(done, waiting)}] {name} ... ",
                    end="",
                    flush=True,
                )
            elif begun and re.search(
                r"\.ipynb: (Executed notebook in|WARNING: Executing notebook failed)",
                line,
            ):
                failed = "WARNING" in line
                print(
                    "FAILED"
                    if failed
                    else f"{time.perf_counter() - begun:.1f} s",
                    flush=True,
                )
                begun = None
    if process.returncode:
        print(failure(lines))
        print(
            f"The book was not built. The full log: {LOG.relative_to(ROOT).as_posix()}"
        )
    return process.returncode == 0


def environment() -> dict[str, str]:
    """This interpreter's own kernel, one thread, and no settings of the user's."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MPLBACKEND", "MPLCONFIGDIR", "MATPLOTLIBRC")
    }
    binaries = str(Path(sys.executable).parent)
    return env | {
        "PATH": os.pathsep.join([binaries, env.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT), env.get("PYTHONPATH", "")])
        ),
        "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(BUILD / ".ipython"),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "NO_COLOR": "1",
    }


def failure(lines: list[str]) -> str:
    """The warnings and errors of a log, each with the lines that belong to it; failing that, the end of the log."""
    shown, inside_traceback, inside = [], False, False
    for line in lines:
        if re.search(r"(^|: )(WARNING|ERROR|CRITICAL|SEVERE): ", line):
            inside_traceback = "Executing notebook failed" in line
            inside = True
        else:
            inside = inside_traceback or (
                inside and line.startswith((" ", "\t"))
            )
        if inside:
            shown.append(line.replace(f"{ROOT}{os.sep}", ""))
        if line.endswith("[mystnb.exec]"):
            inside_traceback = inside = False
    cause = [
        n
        for n, line in enumerate(lines)
        if line.startswith("The above exception was the direct cause")
    ]
    return "\n".join(
        shown or lines[: cause[0] if cause else None][-25:]
    ).rstrip()


if __name__ == "__main__":
    sys.exit(main())
