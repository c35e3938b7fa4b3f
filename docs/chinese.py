"""The chapter's Chinese edition: the English notebooks with their prose replaced.

``docs/zh/1_softmax.zh.md`` holds the translation of each Markdown cell of
``docs/chapter/1_softmax.ipynb`` under a key, a hash of the English cell. Sphinx reads such a file
as a notebook (``nb_custom_formats`` in conf.py): code and outputs are always the English ones.
``python docs/chinese.py`` says which translations are out of date.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import nbformat
from myst_parser.mdit_to_docutils.base import default_slugify
from nbformat import NotebookNode

DOCS = Path(__file__).parent
SUFFIX = ".zh.md"
TRANSLATIONS = sorted((DOCS / "zh").glob("*" + SUFFIX))
# Pages written in Chinese as a whole, and what they render; their keys are hashes of whole files.
PAGES = {
    "zh/index.md": ["chapter/index.md"],
    "zh/playground.md": ["chapter/playground.md"],
    "zh/checklist.md": ["chapter/checklist.md"],
    "zh/exercises.md": [
        "exercises/README.md",
        *(f"exercises/exercise_{n}.py" for n in range(1, 7)),
    ],
}
CELL = re.compile(r"^<!-- (?:(\S+) )?([0-9a-f]{8}) -->\n", re.MULTILINE)


def key(source: str) -> str:
    """The key of a translation, from the English source."""
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def english_notebook(text: str) -> Path:
    """The notebook that a translation file names in its first line."""
    named = re.match(r"<!-- (\S+\.ipynb) -->\n", text)
    if named is None:
        raise ValueError("a translation starts with the comment <!-- NOTEBOOK.ipynb -->")
    return DOCS / "chapter" / named[1]


def translations(text: str) -> dict[str, str]:
    """The Chinese cells of a translation file by their keys."""
    pieces = CELL.split(text)[1:]
    found: dict[str, str] = {}
    for cell_key, translation in zip(pieces[1::3], pieces[2::3], strict=True):
        if cell_key in found:
            raise ValueError(f"the translation {cell_key} is there twice")
        found[cell_key] = translation.strip()
    return found


def read(text: str) -> NotebookNode:
    """The Chinese notebook, from the text of a translation file.

    Raises:
        ValueError: an English cell has no translation, or a translation no English cell.
    """
    path = english_notebook(text)
    notebook, chinese = nbformat.read(path, as_version=4), translations(text)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            if key(cell.source) not in chinese:
                start = cell.source.splitlines()[0]
                message = f"{path.name}, cell {number} ({start}) has no translation with the key"
                raise ValueError(f"{message} {key(cell.source)}: it is new, or it changed")
            cell.source = chinese.pop(key(cell.source))
    if chinese:
        raise ValueError(f"{path.name} has no cell for the translations {', '.join(chinese)}")
    return notebook


def parts(source: str) -> dict[str, set[str]]:
    """What a translation shares with its source: formulas, code and link targets."""
    fences = re.findall(r"^```.*?^```", source, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", source, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"(`+)(.+?)\1", rest)
    rest = re.sub(r"(`+)(.+?)\1", "", rest)
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", rest, re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", source)
    return {
        # Words in a formula are translated, and where its lines break means nothing.
        "formulas": {re.sub(r"\\text\{[^}]*\}|\s", "", formula) for formula in formulas},
        "code": {span for _, span in spans} | set(fences),
        "links": {english_target(link) for link in links},
    }


def anchors(notebook: NotebookNode) -> list[str]:
    """The anchors of a notebook's headings, in order."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [default_slugify(h) for h in re.findall(r"^#+ (.+)$", "\n".join(cells), re.MULTILINE)]


def english_target(link: str) -> str:
    """The link in the English edition: both folders have the same depth and the same names.

    Raises:
        ValueError: the notebook has no heading with the link's anchor.
    """
    page, _, anchor = link.partition("#")
    if not page.endswith(SUFFIX):
        return link.replace("exercises.md", "../exercises/README.md")
    text = (DOCS / "zh" / page).read_text(encoding="utf-8")
    path = english_notebook(text)
    if not anchor:
        return path.name
    place = anchors(read(text)).index(anchor)
    return f"{path.name}#{anchors(nbformat.read(path, as_version=4))[place]}"


def differences(english: str, chinese: str) -> list[str]:
    """Formulas, code spans and links of one cell that the other lacks, one line each."""
    ours, theirs = parts(english), parts(chinese)
    return [
        f"{kind}: {part} is only in the {language} text"
        for kind in ours
        for language, only in (
            ("English", ours[kind] - theirs[kind]),
            ("Chinese", theirs[kind] - ours[kind]),
        )
        for part in sorted(only)
    ]


def twin(page: str) -> str | None:
    """The same page of the chapter in the other language, as Sphinx names it."""
    named = {"exercises/README": "zh/exercises", "zh/exercises": "exercises/README"}
    folder, _, name = page.partition("/")
    return named.get(page) or {"chapter": f"zh/{name}", "zh": f"chapter/{name}"}.get(folder)


def stale() -> list[str]:
    """Translations that are not of today's English text, one line each."""
    found = []
    for path in TRANSLATIONS:
        try:
            read(path.read_text(encoding="utf-8"))
        except ValueError as error:
            found.append(str(error))
    for page, sources in PAGES.items():
        keys = {m[1]: m[2] for m in CELL.finditer((DOCS / page).read_text(encoding="utf-8"))}
        for source in sources:
            today = key((DOCS / source).read_text(encoding="utf-8"))
            if keys.get(source) != today:
                found.append(f"{page} is not of today's {source}, whose key is {today}")
    return found


if __name__ == "__main__":
    print("\n".join(stale()) or "every translation is of today's English text")
