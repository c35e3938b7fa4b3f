"""Sphinx configuration of the site; ``make docs`` builds it."""

import importlib
import re
from itertools import takewhile
from pathlib import Path
from typing import Any
from unicodedata import category

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

import flashlayer
from docs import chinese

ROOT = Path(__file__).parent.parent
logger = logging.getLogger(__name__)

project = "flashlayer"
copyright = "the flashlayer authors"
version = release = flashlayer.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["exercises/solutions"]

# Files elsewhere in the repository that a page of the site includes.
INCLUDED = {
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/NOTES.md": "benchmarks/notes",
    "benchmarks/results/codegen.md": "benchmarks/codegen",
    "benchmarks/results/compiled.md": "benchmarks/compiled",
    "benchmarks/results/scaling/scaling.md": "benchmarks/scaling",
    "benchmarks/results/cpu-2-cores/context/context.md": "benchmarks/context",
    "benchmarks/results/cpu-2-cores/attention.md": "benchmarks/attention",
    "benchmarks/results/cpu-amx-2-cores/attention.md": "benchmarks/masks_and_short",
    "benchmarks/results/cpu-2-cores/backends/attention.md": "benchmarks/backends",
    "benchmarks/results/cpu-2-cores/parity/report.md": "benchmarks/parity",
    "benchmarks/results/cpu-2-cores/training.md": "benchmarks/training",
    "tests/ptx/README.md": "benchmarks/emulator",
}

# A translation is read as a notebook; its suffix is tried before .md, which MyST-NB adds.
source_suffix = {chinese.SUFFIX: "myst-nb", ".rst": "restructuredtext"}
nb_custom_formats = {chinese.SUFFIX: "docs.chinese.read"}

# Show the committed outputs; tests/docs/test_notebooks.py compares them with a run.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "tasklist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "flashlayer"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"


def mathml(latex: str, display: str) -> str:
    """The formula as MathML, which browsers render without a script or a network.

    Raises:
        ExtensionError: the converter left a part of the formula as LaTeX.
    """
    # latex2mathml supports align*, which lays out the same.
    markup = convert(latex.replace("{aligned}", "{align*}"), display=display)
    # The prime character is drawn raised: as an exponent it would be too small to see.
    markup = re.sub(
        r"<msup>(<m[it]\w*>[^<]*</m[it]\w*>)<mi>&#x02032;</mi></msup>",
        r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>',
        markup,
    )
    if leftover := re.search(r"\\\w+|<mi>&</mi>", markup):
        raise ExtensionError(f"{leftover[0]!r} of the formula {latex!r} has no MathML")
    return markup


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """Write an inline formula."""
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed formula, with its number if it has one."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(mathml(node.astext(), "block"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})</span>')
    self.body.append("</div>\n")
    raise nodes.SkipNode


class LinksIntoTheRepository(SphinxTransform):
    """Redirects links to files of the repository to the site's pages with the same content.

    ``[`update`](../../flashlayer/online_softmax.py)`` opens the file where the Markdown is read on
    a code host. On the site it leads to the function's entry in the API reference or, if there is
    none, to the file's listing. A name that is no longer in the file is a warning. Code with a
    space in it is the text of a line: the link leads there and says its number. A warning unless
    exactly one line has the text.
    """

    default_priority = 200

    def apply(self) -> None:
        """Redirect the links of one document."""
        for link in list(self.document.findall(addnodes.download_reference)):
            _, file = self.env.relfn2path(link["reftarget"], self.env.docname)
            self.replace(link, Path(file))
        for link in list(self.document.findall(addnodes.pending_xref)):
            # A Markdown file outside the sources: MyST drops its suffix.
            if link["refdomain"] == "doc" and Path(link["reftarget"]).is_absolute():
                self.replace(link, Path(link["reftarget"] + ".md"))

    def replace(self, link: nodes.Element, file: Path) -> None:
        """Redirect one link, if the site has the content of the file."""
        path = file.relative_to(ROOT).as_posix()
        if path in INCLUDED:
            target = {"refdomain": "std", "reftype": "doc", "reftarget": "/" + INCLUDED[path]}
        elif path.startswith("flashlayer/") and " " in link.astext():
            line = self.line_in(path, link)
            target = {"refdomain": "py", "reftype": "obj", "reftarget": path}
            target |= {"listing": path, "line": line}
        elif path.startswith("flashlayer/"):
            name = self.name_in(path, link)
            target = {"refdomain": "py", "reftype": "obj", "reftarget": name, "listing": path}
        else:
            return
        target |= {"refdoc": self.env.docname, "refexplicit": True, "refwarn": True}
        link.replace_self(addnodes.pending_xref("", *link.children, **target))

    def line_in(self, path: str, link: nodes.Element) -> int:
        """Number of the line that the link's text is from."""
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        numbers = [number for number, line in enumerate(lines, 1) if link.astext() in line]
        if len(numbers) != 1:
            message = "%d lines of %s have %r in them"
            logger.warning(message, len(numbers), path, link.astext(), location=link)
        return numbers[0] if numbers else 1

    def name_in(self, path: str, link: nodes.Element) -> str:
        """Full name of the object that the link's text names; the file's path if it names none."""
        name = link.astext()
        if not re.fullmatch(r"[\w.]+", name) or name.endswith(".py"):
            return path
        if not re.search(rf"\b{name.split('.')[-1]}\b", (ROOT / path).read_text()):
            logger.warning("%s has no %s", path, name, location=link)
        module = path.removesuffix(".py").split("/")
        # The reference documents an object under the outermost package that exports it.
        for depth in range(1, len(module)):
            package = ".".join(module[:depth])
            if name in getattr(importlib.import_module(package), "__all__", ()):
                return f"{package}.{name}"
        return f"{'.'.join(module)}.{name}"


def find_listing(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """The listing for a link into the repository without an entry in the API reference."""
    if "listing" not in node:
        return None
    standard = env.get_domain("std")
    reference = standard.resolve_xref(
        env, node["refdoc"], app.builder, "ref", node["listing"], node, content
    )
    if reference is not None:
        reference.clear()  # of the text that has lost its markup
        reference += content
        if "line" in node:
            reference["refuri"] += f"-{node['line']}"
            place = f" {Path(node['listing']).name}:{node['line']}"
            reference += nodes.inline("", place, classes=["line"])
    return reference


def anchor_lines(app: Sphinx, doctree: nodes.document) -> None:
    """Give each line of a listing an anchor: the id of its section, and the number."""
    for block in doctree.findall(nodes.literal_block):
        if block.get("linenos") and isinstance(block.parent, nodes.section):
            block["highlight_args"]["lineanchors"] = block.parent["ids"][0]


class PunctuationOfFormulas(SphinxTransform):
    """Keeps a formula on one line with its punctuation; browsers break around any formula."""

    default_priority = 900

    def apply(self) -> None:
        """Wrap each formula, an opening mark before it and the closing ones after it."""
        for formula in list(self.document.findall(nodes.math)):
            parent = formula.parent
            index = parent.index(formula)
            before = parent[index - 1] if index else None
            after = parent[index + 1] if index + 1 < len(parent) else None
            whole = nodes.inline("", "", formula, classes=["nobreak"])
            if isinstance(after, nodes.Text) and (marks := first_of(after, {"Po", "Pe", "Pf"})):
                parent[index + 1] = nodes.Text(after[len(marks) :])
                whole.append(nodes.Text(marks))
            if isinstance(before, nodes.Text) and (marks := first_of(before[::-1], {"Ps", "Pi"})):
                parent[index - 1] = nodes.Text(before[: -len(marks)])
                whole.insert(0, nodes.Text(marks[::-1]))
            parent[index] = whole if len(whole) > 1 else formula


def first_of(text: str, kinds: set[str]) -> str:
    """The characters at the start of a text that are of these Unicode categories."""
    return "".join(takewhile(lambda mark: category(mark) in kinds, text))


class LanguageLink(SphinxTransform):
    """Links each page of the chapter to the same page in the other language, below its title."""

    default_priority = 200

    def apply(self) -> None:
        """Add the link to one document."""
        page = self.env.docname
        twin = chinese.twin(page)
        if twin is None:
            return
        if page.startswith("zh/") and twin.startswith("chapter/"):
            self.env.note_dependency(self.env.doc2path(twin))  # code and outputs are from there
        words = "English" if page.startswith("zh/") else "中文版"
        target = {"refdomain": "std", "reftype": "doc", "reftarget": "/" + twin}
        target |= {"refdoc": page, "refexplicit": True, "refwarn": True}
        link = addnodes.pending_xref("", nodes.inline(words, words), **target)
        title = next(iter(self.document.findall(nodes.title)))
        title.parent.insert(1, nodes.paragraph("", "", link, classes=["language"]))


def set_language(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Mark the Chinese pages as Chinese, for screen readers and the choice of fonts."""
    if page.startswith("zh/"):
        context["language"] = "zh-CN"


def setup(app: Sphinx) -> None:
    """Register with Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.add_transform(LinksIntoTheRepository)
    app.add_transform(PunctuationOfFormulas)
    app.add_transform(LanguageLink)
    app.connect("doctree-read", anchor_lines)
    app.connect("html-page-context", set_language)
    app.connect("missing-reference", find_listing)
