"""What the book needs from Sphinx beyond its configuration.

* The repository's address (`repository.url` in _config.yml) is the one public setting. While it is empty, everything
  that would point there is off: Colab, Binder, edit, issue and repository buttons, canonical links and the sitemap.
* A link in words to a numbered figure, `[the three regimes](#fig-three-regimes)`, gets its number: "the three regimes
  (Figure 3)". In the notebook itself such a link reads well without one, which `{numref}` does not.
* The theme's icons come as fonts alone, not as a script of 1.5 MB besides.
* Where there is no triton (macOS, Windows), the pages of Part 5 are built without running them.
* A page that shows `<div class="course-map">` with a `<p data-part="1. Concepts">question</p>` for each part of the
  table of contents gets each part's pages under its question, with their minutes.
* The playground's page gets its form, and the files that book/build.py laid out for it (book/_ext/playground.py).
* A page that shows `<div id="course-progress"></div>` gets the list of the course's pages with their minutes, read
  from each page's `data-minutes`, for book/_static/course.js to draw the reader's progress.
* `{quiz} concepts` shows the questions of that name in moe_course/data/quizzes.yaml. All answers stand behind a toggle;
  book/_static/course.js adds a button that answers a choice. Nothing is kept or sent.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import playground
import yaml
from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

MINUTES = re.compile(r'data-minutes="(\d+)"')


def public_address(repository_url):
    """Where GitHub Pages serves a repository: https://OWNER.github.io/REPO/ ("" for any other host)."""
    parts = urlsplit(repository_url)
    owner, _, repo = parts.path.strip("/").removesuffix(".git").partition("/")
    if parts.netloc != "github.com" or not repo or "/" in repo:
        return ""
    host = f"{owner.lower()}.github.io"
    return (
        f"https://{host}/"
        if repo.lower() == host
        else f"https://{host}/{repo}/"
    )


def set_address(app):
    """Turn on what needs the public address, or turn it all off."""
    config, options = app.config, app.config.html_theme_options
    url = options.get("repository_url", "")
    for button in (
        "use_repository_button",
        "use_edit_page_button",
        "use_issues_button",
    ):
        options[button] = bool(url)
    if not url:
        options.pop("repository_url", None)
        options["launch_buttons"] = {}
        return
    config.html_baseurl = config.html_baseurl or public_address(url)
    config.ogp_site_url = config.html_baseurl
    config.ogp_use_first_image = bool(config.html_baseurl)
    if config.html_baseurl:
        config.sitemap_url_scheme = "{link}"
        config.sitemap_excludes = [
            "search.html",
            "genindex.html",
            "py-modindex.html",
            "index.html",
        ]
        app.setup_extension("sphinx_sitemap")


def leave_kernels_unrun(app):
    """Without triton the chapters about kernels cannot run: show them without outputs, so without their figures."""
    if find_spec("triton") is None:
        app.config.nb_execution_excludepatterns += ["book/kernels/*"]
        app.config.suppress_warnings += ["myst.xref_missing"]
        app.config.autodoc_mock_imports += ["triton"]


def note_minutes(app, doctree):
    """Remember the minutes a page announces (Sphinx forgets a page's metadata when it re-reads the page)."""
    for raw in doctree.findall(nodes.raw):
        if found := MINUTES.search(raw.astext()):
            app.env.metadata[app.env.docname]["course_minutes"] = int(found[1])
            return


def number_figure_links(app, doctree, docname):
    """Append its number to every link to a figure."""
    numbers = {
        anchor: number
        for page in app.env.toc_fignumbers.values()
        for anchor, number in page.get("figure", {}).items()
        if anchor.startswith(
            "fig-"
        )  # such names are labels, and a label is unique in the book
    }
    for link in doctree.findall(nodes.reference):
        anchor = link.get("refid") or link.get("refuri", "").partition("#")[2]
        if anchor in numbers and not link.get("refuri", "").startswith(
            ("http:", "https:")
        ):
            link += nodes.Text(
                f" (Figure {'.'.join(map(str, numbers[anchor]))})"
            )


def add_course_pages(app, pagename, templatename, context, doctree):
    """Give the landing page the list of pages that count, in the order of the table of contents."""
    if 'id="course-progress"' not in context.get("body", ""):
        return
    pages = [
        {
            "page": name,
            "title": app.env.titles[name].astext(),
            "minutes": minutes,
        }
        for name in reading_order(app.env, app.config.root_doc)
        if (minutes := app.env.metadata[name].get("course_minutes"))
    ]
    data = json.dumps(pages).replace("<", "\\u003c")
    context["body"] += (
        f'<script type="application/json" id="course-pages">{data}</script>'
    )


def draw_map(app, pagename, templatename, context, doctree):
    """Under the question of each part, its pages with their minutes; book/_static/course.js ticks what is done."""
    if 'class="course-map"' not in context.get("body", ""):
        return
    page = BeautifulSoup(context["body"], "html.parser")
    parts = {
        tree.caption: tree.items
        for tree in app.config.external_site_map.root.subtrees
    }
    for question in page.select(".course-map [data-part]"):
        caption = question["data-part"]
        card = page.new_tag("section")
        question.wrap(card)
        title = page.new_tag("h3")
        title.string = caption
        question.insert_before(title)
        links = page.new_tag("ol")
        for name in parts[caption]:
            address = context["pathto"](str(name))
            item, link = page.new_tag("li"), page.new_tag("a", href=address)
            link.string = app.env.titles[str(name)].astext()
            item.append(link)
            if minutes := app.env.metadata[str(name)].get("course_minutes"):
                note = page.new_tag("span")
                note.string = f"{minutes} min"
                item.append(note)
            links.append(item)
        card.append(links)
    context["body"] = str(page)


def take_playground(app):
    """Copy what the playground runs, Pyodide and the package's modules, into _static."""
    folder = Path(app.srcdir) / "_build" / "playground"
    if folder.exists():
        app.config.html_static_path.append(str(folder))


def add_playground(app, pagename, templatename, context, doctree):
    """Put the form into its page, and say in it whether Pyodide is there."""
    if playground.PLACE in context.get("body", ""):
        folder = Path(app.srcdir) / "_build" / "playground" / "playground"
        runtime = (folder / "pyodide" / playground.FILES[0]).exists()
        form = playground.form(context["pathto"]("_static/", 1), runtime)
        context["body"] = context["body"].replace(playground.PLACE, form)


def reading_order(env, name):
    yield name
    for child in env.toctree_includes.get(name, []):
        yield from reading_order(env, child)


def drop_relative_og_url(app, pagename, templatename, context, doctree):
    """OpenGraph wants absolute addresses: without a public one, og:url would be a lie."""
    if doctree and not app.config.ogp_site_url:
        context["metatags"] = re.sub(
            r'<meta property="og:url"[^>]*>\s*', "", context["metatags"]
        )


ICON_SCRIPT = re.compile(r"<script[^>]*/fontawesome/[^>]*></script>\s*")


def drop_icon_script(app, exception):
    """The theme sends its icons twice: as fonts, and as 1.5 MB of script that draws the same ones. The fonts will do."""
    if exception or app.builder.format != "html":
        return
    site = Path(app.outdir)
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(ICON_SCRIPT.sub("", text), encoding="utf-8")
    for script in site.glob("_static/vendor/fontawesome/*/js/all.min.js*"):
        script.unlink()


def note_includes(app, env):
    """Tell book/build.py which files outside the pages themselves were read."""
    root = Path(app.srcdir).resolve()
    files = {
        (root / file).resolve()
        for found in env.dependencies.values()
        for file in found
    }
    inside = sorted(
        file.relative_to(root).as_posix()
        for file in files
        if file.is_relative_to(root)
    )
    (Path(app.doctreedir) / "includes.json").write_text(json.dumps(inside))


CHAPTER = re.compile(r"\bbook/(?!data/)[a-z]+/[a-z_]+\b(?!/|\.\w)")


class Quiz(SphinxDirective):
    """Multiple choice: a fieldset of radio buttons for each question, the explained answers in its <details>."""

    required_arguments = 1

    def run(self):
        path = Path(self.env.srcdir) / "moe_course" / "data" / "quizzes.yaml"
        self.env.note_dependency(str(path))
        quizzes = yaml.safe_load(path.read_text(encoding="utf8"))
        if self.arguments[0] not in quizzes:
            raise self.error(
                f"no quiz {self.arguments[0]!r} in moe_course/data/quizzes.yaml, which has {', '.join(quizzes)}"
            )
        shown = []
        for number, question in enumerate(quizzes[self.arguments[0]], 1):
            shown += self.question(number, question)
        return shown

    def question(self, number, question):
        yield self.html(
            f'<fieldset class="quiz" id="question-{number}"><legend>{number}. '
        )
        yield self.text(question["ask"])
        yield self.html("</legend>")
        for option in question["options"]:
            yield self.html(
                f'<label><input type="radio" name="question-{number}"> '
            )
            yield self.text(option.get("right") or option["wrong"])
            yield self.html("</label>")
        yield self.html(
            "<details><summary>All answers, explained</summary><ul>"
        )
        for option in question["options"]:
            kind = "right" if "right" in option else "wrong"
            yield self.html(
                f'<li class="quiz-{kind}"><strong>{kind.capitalize()}:</strong> '
            )
            yield self.text(option[kind])
            yield self.html("<br>")
            yield self.text(option["why"], "quiz-why")
            yield self.html("</li>")
        yield self.html("</ul><p>Shown in ")
        yield self.text(question["see"])
        yield self.html(".</p></details></fieldset>")

    def html(self, markup):
        return nodes.raw("", markup, format="html")

    def text(self, markdown, *classes):
        found, _ = self.parse_inline(markdown)
        return nodes.inline("", "", *found, classes=[*classes])


ARGUMENT = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")


def mark_up_docstring(app, what, name, obj, options, lines):
    """Docstrings are written to be read as text: here `name: what it is` becomes a field, a formula a literal block,
    and the path of a page a link to it."""

    def link(path):
        known = path[0] in app.env.found_docs
        return f":doc:`/{path[0]}`" if known else path[0]

    shown, last = [], "blank"
    for line in lines:
        argument = ARGUMENT.match(line)
        kind = "blank" if not line.strip() else "field" if argument else "text"
        if kind == "text" and line.startswith("    "):
            kind = "field" if last == "field" else "literal"
        if kind == "literal" and last != "literal":
            shown += ["", "::", ""]
        elif "blank" not in (kind, last) and kind != last:
            shown.append("")
        if kind != "literal":
            line = re.sub(r"([*|])", r"\\\1", line)
            line = CHAPTER.sub(link, line)
            argument = ARGUMENT.match(line)
        shown.append(f":{argument[1]}: {argument[2]}" if argument else line)
        last = kind
    lines[:] = shown


def setup(app):
    set_address(app)
    leave_kernels_unrun(app)
    app.add_directive("quiz", Quiz)
    take_playground(app)
    app.connect("autodoc-process-docstring", mark_up_docstring)
    app.connect("doctree-read", note_minutes)
    app.connect("env-updated", note_includes)
    app.connect("doctree-resolved", number_figure_links)
    app.connect("html-page-context", add_course_pages)
    app.connect("html-page-context", draw_map)
    app.connect("html-page-context", add_playground)
    app.connect("html-page-context", drop_relative_og_url, priority=900)
    app.connect("build-finished", drop_icon_script)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
