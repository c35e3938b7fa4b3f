"""The site: ``make docs``."""

import re
from pathlib import Path

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
    "benchmarks/NOTES.md": "benchmarks/notes",
    "benchmarks/results/codegen.md": "benchmarks/codegen",
    "benchmarks/results/compiled.md": "benchmarks/compiled",
    "benchmarks/results/scaling/scaling.md": "benchmarks/scaling",
    "benchmarks/results/cpu-2-cores/context/context.md": "benchmarks/context",
    "benchmarks/results/cpu-2-cores/attention.md": "benchmarks/attention",
    "benchmarks/results/cpu-2-cores/backends/attention.md": "benchmarks/backends",
    "benchmarks/results/cpu-2-cores/parity/report.md": "benchmarks/parity",
}

# The page shows the committed outputs; tests/docs/test_notebooks.py holds them to the code.
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
    """The formula as MathML, which browsers show without a script and without a network.

    Raises:
        ExtensionError: the converter left something of it untranslated.
    """
    # The converter knows the environment under its other name.
    markup = convert(latex.replace("{aligned}", "{align*}"), display=display)
    # A prime is a raised sign already: raised again, as a small exponent, it vanishes.
    markup = re.sub(
        r"<msup>(<m[it]\w*>[^<]*</m[it]\w*>)<mi>&#x02032;</mi></msup>",
        r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>',
        markup,
    )
    if leftover := re.search(r"\\\w+|<mi>&</mi>", markup):
        raise ExtensionError(f"{leftover[0]!r} of the formula {latex!r} has no MathML")
    return markup


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line of text."""
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """A formula of its own."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(mathml(node.astext(), "block"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})</span>')
    self.body.append("</div>\n")
    raise nodes.SkipNode


class LinksIntoTheRepository(SphinxTransform):
    """A link to a file of the repository stays on the site where the site has what is in it.

    ``[`update`](../../flashlayer/online_softmax.py)`` opens the file where the Markdown is read as
    it is. Here it leads to the function's entry in the API reference or, if it has none, to the
    file's listing. A name that the file no longer has is a warning.
    """

    default_priority = 200

    def apply(self) -> None:
        """Replace them in one document."""
        for link in list(self.document.findall(addnodes.download_reference)):
            _, file = self.env.relfn2path(link["reftarget"], self.env.docname)
            self.replace(link, Path(file))
        for link in list(self.document.findall(addnodes.pending_xref)):
            # A page outside the sources, which MyST has without its suffix.
            if link["refdomain"] == "doc" and Path(link["reftarget"]).is_absolute():
                self.replace(link, Path(link["reftarget"] + ".md"))

    def replace(self, link: nodes.Element, file: Path) -> None:
        """Let a link to a file lead to where the site has it, if it has."""
        path = file.relative_to(ROOT).as_posix()
        if path in INCLUDED:
            target = {"refdomain": "std", "reftype": "doc", "reftarget": "/" + INCLUDED[path]}
        elif path.startswith("flashlayer/"):
            name = self.name_in(path, link)
            target = {"refdomain": "py", "reftype": "obj", "reftarget": name, "listing": path}
        else:
            return
        target |= {"refdoc": self.env.docname, "refexplicit": True, "refwarn": True}
        link.replace_self(addnodes.pending_xref("", *link.children, **target))

    def name_in(self, path: str, link: nodes.Element) -> str:
        """What the link calls by name, in full; the file's name if nothing."""
        name = link.astext()
        if not re.fullmatch(r"[\w.]+", name) or name.endswith(".py"):
            return path
        if not re.search(rf"\b{name.split('.')[-1]}\b", (ROOT / path).read_text()):
            logger.warning("%s has no %s", path, name, location=link)
        if name in flashlayer.__all__:
            return f"flashlayer.{name}"
        return f"{path.removesuffix('.py').replace('/', '.')}.{name}"


def find_listing(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Where a link into the repository leads that the API reference has no entry for."""
    if "listing" not in node:
        return None
    standard = env.get_domain("std")
    return standard.resolve_xref(
        env, node["refdoc"], app.builder, "ref", node["listing"], node, content
    )


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.add_transform(LinksIntoTheRepository)
    app.connect("missing-reference", find_listing)
