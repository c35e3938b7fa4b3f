"""The chapter as a book: one PDF in each language, printed by headless Chromium.

``make book`` builds the site and then runs ``python -m docs.book build/docs build/book``. The pages
of the chapter are taken from the site, so text, formulas, outputs and pictures are the site's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.parse import urldefrag

from bs4 import BeautifulSoup, Tag

from docs.browser import chromium
from docs.notebooks import NOTEBOOKS

STYLE = Path(__file__).parent / "book.css"
NAMES = ["index", *(path.stem for path in NOTEBOOKS), "checklist"]
# Pages of each edition, in order, by its language.
PAGES = {
    "en": [*(f"chapter/{name}" for name in NAMES), "exercises/README"],
    "zh-CN": [*(f"zh/{name}" for name in NAMES), "zh/exercises"],
}
TITLES = {"en": "Online softmax and FlashAttention", "zh-CN": "在线 Softmax 与 FlashAttention"}
CONTENTS = {"en": "Contents", "zh-CN": "目录"}
WHOLE_LINES = 24  # a longer listing may be cut between two pages


def article(site: Path, page: str, pages: list[str]) -> Tag:
    """The content of one page of the site, with links and ids that hold in the whole book."""
    file = site / f"{page}.html"
    content = BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser").article
    if content is None:
        raise ValueError(f"{file} has no <article>")
    # Code that the site hides until it is asked for draws a picture; the book has the picture.
    for extra in content.select(".headerlink, .language, .toctree-wrapper, script, details.hide"):
        extra.decompose()
    for listing in content.select("pre"):
        if listing.text.count("\n") <= WHOLE_LINES:
            listing["class"] = "whole"
    for tag in content.select("[id]"):
        tag["id"] = f"{page}#{tag['id']}"
    content["id"] = page
    for image in content.select("img"):
        image["src"] = (file.parent / str(image["src"])).resolve().as_uri()
    for link in content.select("a[href]"):
        path, anchor = urldefrag(str(link["href"]))
        if path.startswith(("http:", "https:")):
            continue
        target = (file.parent / path).resolve() if path else file.resolve()
        name = target.relative_to(site.resolve()).with_suffix("").as_posix()
        if name in pages:
            link["href"] = f"#{name}" + (f"#{anchor}" if anchor else "")
        else:
            link.unwrap()  # a page that the book doesn't have
    return content


def book(site: Path, language: str) -> str:
    """An edition as one HTML page: title, table of contents, the pages."""
    title, pages = TITLES[language], PAGES[language]
    articles = [article(site, page, pages) for page in pages]
    entries = []
    for content in articles:
        for section in content.select("section:has(> h1), section:has(> h2)"):
            heading = section.select("h1, h2")[0]
            kind = "part" if heading.name == "h1" else "section"
            link = f'<a href="#{section["id"]}">{heading.text}</a>'
            entries.append(f'<li class="{kind}">{link}</li>')
    code_style = (site / "_static" / "pygments.css").as_uri()
    return f"""<!doctype html>
<html lang="{language}"><head><meta charset="utf-8"><title>{title}</title>
<link rel="stylesheet" href="{code_style}"><link rel="stylesheet" href="{STYLE.as_uri()}"></head>
<body><div class="title"><p>flashlayer</p><h1>{title}</h1></div>
<nav><h2>{CONTENTS[language]}</h2><ol>{"".join(entries)}</ol></nav>
{"".join(map(str, articles))}
</body></html>
"""


def missing_font(language: str) -> str | None:
    """What to install if the machine has no font with Chinese characters; None if it has one."""
    try:
        fonts = subprocess.run(["fc-list", ":lang=zh"], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        return None  # without fontconfig there is nothing to ask
    if language != "zh-CN" or fonts.stdout:
        return None
    return "no font here has Chinese characters: install fonts-noto-cjk (Debian, Ubuntu) or another"


def main(site: Path, out: Path) -> None:
    """Write each edition as HTML and as PDF."""
    out.mkdir(parents=True, exist_ok=True)
    for language in PAGES:
        if missing := missing_font(language):
            raise FileNotFoundError(missing)
        page = out / f"flashlayer-{language}.html"
        page.write_text(book(site, language), encoding="utf-8")
        pdf = page.with_suffix(".pdf")
        options = ["--no-pdf-header-footer", "--generate-pdf-document-outline"]
        chromium(*options, f"--print-to-pdf={pdf.resolve()}", page.resolve().as_uri())
        print(pdf)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except FileNotFoundError as error:
        sys.exit(f"make book: {error}")
