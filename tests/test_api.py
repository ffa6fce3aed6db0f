"""The API page: what it documents says what it computes, of which shapes, and where that comes from."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

# A paper, a page, other people's code; or the chapter that derives and tests it, or the exercise that it serves.
SOURCE = re.compile(
    r"arXiv:\d{4}\.\d{4,5}|https?://|`transformers`|et al\. \(\d{4}\)|book/[a-z]+/[a-z_]+|exercises/\d\d_[a-z]+"
)
# The course's own machinery: it computes nothing that a source could confirm.
OWN = {
    "moe_course.grading.core",
    "moe_course.grading.notebook",
    "moe_course.plots",
    "moe_course.records",
    "moe_course.show",
    "moe_course.training.runs",
}
SHAPED = re.compile(r"\b(?:Float|Int|Bool|UInt8|Num|Shaped|Inexact|Integer)\[[^\]]*\]")
IN_BRACKETS = re.compile(r"\[[^\]\d][^\]]*\]")
BLOCK = re.compile(r"\.\. auto(module|class|function):: (\S+)\n((?:   :.*\n)*)")


def documented(root):
    """(module, name, object) of everything on the API page, methods of classes not counted."""
    page = (root / "book/reference/api.md").read_text(encoding="utf-8") + "\n"
    for kind, path, options in BLOCK.findall(page):
        if kind != "module":
            module, name = path.rsplit(".", 1)
            module = importlib.import_module(module)
            yield module, name, getattr(module, name)
            continue
        module = importlib.import_module(path)
        if ":members:" not in options:
            continue
        listed = re.search(r":members:(.*)", options)[1]
        names = [n.strip() for n in listed.split(",") if n.strip()]
        for name in names or own_names(module):
            yield module, name, getattr(module, name)


def own_names(module):
    return [
        name
        for name, obj in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(obj) or inspect.isfunction(obj))
        and obj.__module__ == module.__name__
    ]


def functions(name, obj):
    """The function, or a class's own methods that are no private ones."""
    if inspect.isfunction(obj):
        return {name: obj}
    return {
        f"{name}.{key}": value
        for key, value in vars(obj).items()
        if inspect.isfunction(value) and not key.startswith("_")
    }


@pytest.fixture(scope="module")
def public(root):
    found = [
        (module, name, obj)
        for module, name, obj in documented(root)
        if inspect.isclass(obj) or inspect.isfunction(obj)
    ]
    assert len(found) > 250
    return found


def test_everything_documented_has_a_docstring_of_its_own(public):
    missing = []
    for module, name, obj in public:
        text = vars(obj).get("__doc__") if inspect.isclass(obj) else obj.__doc__
        # A dataclass without one gets its own signature.
        if not text or text.startswith(f"{name}("):
            missing.append(f"{module.__name__}.{name}")
    assert not missing


def test_every_tensor_has_a_shape(public):
    """In the annotation; where Triton forbids that, or tensors are many in one argument, in the docstring."""
    missing = []
    for module, name, obj in public:
        for where, function in functions(name, obj).items():
            annotations = inspect.get_annotations(function).values()
            bare = any(
                re.search(r"\bTensor\b", SHAPED.sub("", str(a))) for a in annotations
            )
            text = (function.__doc__ or "") + (obj.__doc__ or "")
            if bare and not IN_BRACKETS.search(text):
                missing.append(f"{module.__name__}.{where}")
    assert not missing


def test_everything_documented_names_its_source(public):
    missing = [
        f"{module.__name__}.{name}"
        for module, name, obj in public
        if module.__name__ not in OWN
        and not SOURCE.search((obj.__doc__ or "") + (module.__doc__ or ""))
    ]
    assert not missing


def test_what_packages_export_is_on_the_page(public):
    shown = {name for _, name, _ in public}
    for package in ("balance", "finetune", "layers", "specs"):
        module = importlib.import_module(f"moe_course.{package}")
        for name in module.__all__:
            obj = getattr(module, name)
            kind = inspect.isclass(obj) or inspect.isfunction(obj)
            assert name in shown or not kind, f"moe_course.{package}.{name}"
