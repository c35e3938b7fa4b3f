"""The site builds without a warning, and its pages load nothing from the network."""

import html
import re
import subprocess
import sys
from pathlib import Path
from unicodedata import category

import pytest
from bs4 import BeautifulSoup

from docs import book
from docs.notebooks import NOTEBOOKS
from tests.docs.browser import browse

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-d", str(out / "doctrees")]
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "docs", str(out / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return out / "html"


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert site / "chapter" / "1_softmax.html" in pages
    loads = r'<(?:script|img|iframe|source)[^>]*\bsrc="([^"]+)"|<link[^>]*\bhref="([^"]+)"'
    for page in pages:
        for found in re.findall(loads, page.read_text(encoding="utf-8")):
            assert not re.match(r"(https?:)?//", "".join(found)), (page, found)


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "chapter" / "1_softmax.html").read_text(encoding="utf-8")
    assert page.count("<math") > 10
    assert "$" not in re.sub(r"<pre.*?</pre>|<script.*?</script>", "", page, flags=re.DOTALL)


@pytest.mark.parametrize("folder", ["chapter", "zh"])
def test_a_formula_keeps_its_punctuation(site: Path, folder: str) -> None:
    page = html.unescape((site / folder / "6_backward.html").read_text(encoding="utf-8"))
    found = re.findall(r"</math>([^<\w\s])[^<\w\s]*(</span>)?", page)
    ends = [end for mark, end in found if category(mark) in {"Po", "Pe", "Pf"}]
    assert len(ends) > 10
    assert all(ends)


def test_a_named_function_leads_to_its_reference_or_listing(site: Path) -> None:
    page = (site / "api" / "online_softmax.html").read_text(encoding="utf-8")
    assert 'id="flashlayer.online_softmax.merge"' in page
    chapter = (site / "chapter" / "1_softmax.html").read_text(encoding="utf-8")
    assert 'href="../api/source.html#flashlayer-online-softmax-py"' in chapter


@pytest.mark.parametrize("folder", ["chapter", "zh"])
def test_a_quoted_line_leads_to_that_line(site: Path, folder: str) -> None:
    def text(markup: str) -> str:
        return html.unescape(re.sub("<[^>]*>", "", markup))

    page = (site / folder / "checklist.html").read_text(encoding="utf-8")
    listing = (site / "api" / "source.html").read_text(encoding="utf-8")
    link = r'href="\.\./api/source\.html#(\S+-(\d+))">(.*?)<span class="line">(.*?)</span></a>'
    quotes = re.findall(link, page)
    assert len(quotes) >= 18
    for anchor, number, quote, place in quotes:
        line = text(listing.split(f'<a id="{anchor}" ')[1].split("\n")[0])
        assert text(quote) in line
        assert re.search(rf">\s*{number}", line)
        assert place.endswith(f".py:{number}")


def test_primes_are_not_raised_twice(site: Path) -> None:
    """A prime set as an exponent is too small to see: m' would read m."""
    page = (site / "chapter" / "2_online_softmax.html").read_text(encoding="utf-8")
    assert "&#x02032;</mo>" in page
    assert "&#x02032;</mi>" not in page


PAGES = [f"{path.stem}.html" for path in NOTEBOOKS]
PAGES += ["index.html", "exercises.html", "stepper.html", "playground.html", "checklist.html"]


@pytest.mark.parametrize("name", PAGES)
def test_every_page_of_the_chapter_leads_to_the_other_language(site: Path, name: str) -> None:
    english = "exercises/README.html" if name == "exercises.html" else f"chapter/{name}"
    chinese = f"zh/{name}"
    for page, other, words in ((english, chinese, "中文版"), (chinese, english, "English")):
        text = (site / page).read_text(encoding="utf-8")
        link = f'<p class="language"><a class="reference internal" href="../{other}">'
        assert re.search(re.escape(link) + f"<span[^>]*>{words}<", text), page
        assert f'lang="{"zh-CN" if page.startswith("zh/") else "en"}"' in text


@pytest.mark.parametrize("name", PAGES)
def test_no_markup_is_left_in_the_chinese_text(site: Path, name: str) -> None:
    """Between Chinese letters and punctuation, Markdown's ** may open or close nothing."""
    page = (site / "zh" / name).read_text(encoding="utf-8")
    article = page.split("<article")[1].split("</article>")[0]
    text = re.sub(r"<(pre|math|code).*?</\1>", "", article, flags=re.DOTALL)
    assert not re.search(r"\*|\$|`", text)


def test_a_chinese_notebook_has_the_english_outputs(site: Path) -> None:
    pages = [(site / folder / "1_softmax.html").read_text("utf-8") for folder in ("chapter", "zh")]
    code = r'<div class="(?:cell_input|cell_output).*?<pre>(.*?)</pre>'
    english, translated = (re.findall(code, page, re.DOTALL) for page in pages)
    assert len(english) > 15
    assert translated == english


def test_the_playground_is_on_its_pages(site: Path) -> None:
    for page, words in {"chapter": "Read on", "zh": "继续阅读"}.items():
        dom = browse("--dump-dom", (site / page / "playground.html").as_uri())
        assert dom.count("<h1>") == 1
        assert dom.count("<table") == 4
        assert words in dom
        assert "5.4023" in dom


def test_the_stepper_is_on_its_pages(site: Path) -> None:
    for page, words in {"chapter": "Load q0\u2013q3.", "zh": "载入 q0\u2013q3。"}.items():
        dom = browse("--dump-dom", (site / page / "stepper.html").as_uri())
        assert dom.count("<h1>") == 1
        assert words in dom
        assert 'class="line at"' in dom


@pytest.fixture(scope="module")
def books(site: Path) -> dict[str, str]:
    return {language: book.book(site, language) for language in book.PAGES}


@pytest.mark.parametrize("language", book.PAGES)
def test_the_book_holds_together(books: dict[str, str], language: str) -> None:
    pages = book.PAGES[language]
    folder = ROOT / "docs" / pages[0].split("/")[0]
    written = {path.name.split(".")[0] for path in folder.glob("[!.]*") if path.suffix != ".py"}
    interactive = {"playground", "stepper"}
    assert {page.split("/")[1] for page in pages} - {"README"} == written - interactive
    soup = BeautifulSoup(books[language], "html.parser")
    ids = [str(tag["id"]) for tag in soup.select("[id]")]
    assert len(ids) == len(set(ids))
    for link in soup.select("a"):
        assert str(link["href"]).startswith("https://") or link["href"][1:] in ids, link
    for image in soup.select("img"):
        assert Path(str(image["src"]).removeprefix("file://")).is_file()
    assert len(soup.select("article > section > h1")) == len(pages)
    assert len(soup.select("math")) > 200
    assert not soup.select("script, .headerlink, details")


def test_the_book_is_printed(books: dict[str, str], tmp_path: Path) -> None:
    if missing := book.missing_font("zh-CN"):
        pytest.skip(missing)
    page, pdf = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(books["zh-CN"], encoding="utf-8")
    browse("--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri())
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert 50 < len(re.findall(rb"/Type /Page\b", content)) < 120


def test_no_chinese_font_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_font(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(subprocess, "run", no_font)
    assert book.missing_font("en") is None
    assert "fonts-noto-cjk" in (book.missing_font("zh-CN") or "")
