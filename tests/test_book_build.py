"""book/build.py and book/_ext/course.py on books of a few pages, for what the real one must not be changed for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import bs4
import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def small_book(
    root: Path, pages: dict[str, str | list[str]], address: str = ""
) -> None:
    """A book with the real configuration, extension and style; a page is Markdown or a list of code cells."""
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / name, root / "book" / name)
    for name in ("build.py", "references.bib"):
        shutil.copy(ROOT / "book" / name, root / "book")
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["repository"]["url"] = address
    (root / "_config.yml").write_text(yaml.safe_dump(config))
    first, *rest = pages
    toc = {
        "format": "jb-book",
        "root": first,
        "chapters": [{"file": page} for page in rest],
    }
    (root / "_toc.yml").write_text(yaml.safe_dump(toc))
    for page, content in pages.items():
        write_page(root, page, content)


def write_page(root: Path, page: str, content: str | list[str]) -> None:
    if isinstance(content, str):
        (root / f"{page}.md").write_text(content)
        return
    cells = [nbformat.v4.new_markdown_cell(f"# {page}", id="title")]
    cells += [
        nbformat.v4.new_code_cell(code, id=f"cell{n}") for n, code in enumerate(content)
    ]
    # What Jupyter writes: a page that is not run has no kernel to tell its language.
    metadata = {"language_info": {"name": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, root / f"{page}.ipynb")


def build_small_book(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "book/build.py"], cwd=root, capture_output=True, text=True
    )


FIGURE = "```{figure} book/_static/favicon.svg\n:alt: Eight squares\n:name: fig-squares\n\nSquares.\n```"


@pytest.fixture(scope="module", params=["", "https://github.com/example/moe"])
def address_and_html(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("book")
    pages = {
        "start": "# Start\n\nSee [the squares](#fig-squares).",
        "next": f"# Next\n\n{FIGURE}",
        "chapter": [],
    }
    small_book(root, pages, address=request.param)
    built = build_small_book(root)
    assert built.returncode == 0, built.stdout
    return request.param, root / "_build" / "html"


def test_the_address_is_one_setting(address_and_html: tuple[str, Path]) -> None:
    address, html = address_and_html
    page = bs4.BeautifulSoup((html / "chapter.html").read_text(), "html.parser")
    links = {
        link["href"]
        for link in page.find_all("a", href=True)
        if link["href"].startswith("http")
    }
    canonical = [link["href"] for link in page.find_all("link", rel="canonical")]
    og_url = [tag["content"] for tag in page.find_all("meta", property="og:url")]
    if not address:
        assert not links
        assert not canonical
        assert not og_url
        assert not (html / "sitemap.xml").exists()
        return
    issue = (
        "title=Issue%20on%20page%20%2Fchapter.html&body=Your%20issue%20content%20here."
    )
    assert links == {
        "https://colab.research.google.com/github/example/moe/blob/main/chapter.ipynb",
        "https://mybinder.org/v2/gh/example/moe/main?urlpath=lab/tree/chapter.ipynb",
        "https://github.com/example/moe",
        "https://github.com/example/moe/edit/main/chapter.ipynb",
        f"https://github.com/example/moe/issues/new?{issue}",
    }
    assert canonical == og_url == ["https://example.github.io/moe/chapter.html"]
    sitemap = ElementTree.parse(html / "sitemap.xml").getroot()
    assert {tag.text for tag in sitemap.iter() if tag.tag.endswith("loc")} == {
        f"https://example.github.io/moe/{name}.html"
        for name in ("start", "next", "chapter")
    }


def test_a_link_to_a_figure_carries_its_number(
    address_and_html: tuple[str, Path],
) -> None:
    _, html = address_and_html
    page = bs4.BeautifulSoup((html / "start.html").read_text(), "html.parser")
    assert (
        page.select_one('article a[href="next.html#fig-squares"]').text
        == "the squares (Figure 1)"
    )


def test_a_change_reruns_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    package = tmp_path / "moe_course"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("value = 111111\n")
    (package / "near.py").write_text("from .deep import value\n")
    (package / "other.py").write_text("value = 222222\n")
    uses, apart = (
        "from moe_course.near import value\nvalue",
        "from moe_course import other\nother.value",
    )
    small_book(
        tmp_path, {"start": "# Start\n\nWords.", "uses": [uses], "apart": [apart]}
    )

    def build() -> tuple[int, set[str], str]:
        built = build_small_book(tmp_path)
        executed = set(
            re.findall(r"^\[\d+/\d+\] (\w+) \.\.\. ", built.stdout, re.MULTILINE)
        )
        return built.returncode, executed, built.stdout

    def shown(page: str) -> str:
        return (tmp_path / "_build" / "html" / f"{page}.html").read_text()

    code, executed, output = build()
    assert code == 0, output
    assert executed == {"uses", "apart"}
    assert "[2/2]" in output
    assert "111111" in shown("uses")

    code, executed, output = build()
    assert (code, executed) == (0, set())
    assert output.startswith("The book is up to date.")

    # A module two imports away, with the same size and date as before.
    date = (package / "deep.py").stat().st_mtime_ns
    (package / "deep.py").write_text("value = 333333\n")
    os.utime(package / "deep.py", ns=(date, date))
    code, executed, output = build()
    assert (code, executed) == (0, {"uses"}), output
    assert "333333" in shown("uses")
    assert "222222" in shown("apart")

    # A page with a new title, which the other pages' sidebars show, and a broken link: a failure that does not go
    # away by building again.
    write_page(tmp_path, "start", "# Another title\n\n[Nowhere](#no-such-anchor)")
    for _ in range(2):
        code, executed, output = build()
        assert (code, executed) == (1, set()), output
        assert "no-such-anchor" in output
        assert "Another title" in shown("apart")

    # A failing cell: its message is shown.
    write_page(tmp_path, "apart", [apart, "assert other.value == 0, 'the diagnosis'"])
    code, executed, output = build()
    assert (code, executed) == (1, {"apart"}), output
    assert "the diagnosis" in output


def test_without_triton_the_kernels_are_shown_but_not_run(tmp_path):
    (tmp_path / "book" / "kernels").mkdir(parents=True)
    figure = "[the figure](#fig-of-a-cell)"
    api = "```{eval-rst}\n.. automodule:: moe_course.kernels.grouped_gemm\n   :members: combine\n```"
    pages = {
        "index": f"# Start\n\n{figure}\n\n{api}",
        "book/kernels/page": ["print(6 * 7)"],
    }
    small_book(tmp_path, pages)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder as P\n"
        "find = P.find_spec\n"
        "P.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
    )
    path = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "book/build.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "book/kernels is shown without outputs" in done.stdout
    page = (tmp_path / "_build/html/book/kernels/page.html").read_text()
    text = bs4.BeautifulSoup(page, "html.parser").main.get_text()
    assert "print(6 * 7)" in text
    assert "42" not in text
