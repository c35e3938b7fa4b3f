"""The Chinese edition says what today's English one says, with the same code and formulas."""

import re
from pathlib import Path

import nbformat
import pytest

from docs import chinese
from docs.chinese import DOCS, PAGES, TRANSLATIONS, differences, key, read, stale, translations
from docs.notebooks import NOTEBOOKS

HAN = "[\u4e00-\u9fff]"
# No space between Chinese and Latin, digits, code or formulas; ASCII punctuation in Chinese.
UNEVEN = re.compile(rf"{HAN}[A-Za-z0-9$`]|[A-Za-z0-9$`]{HAN}|{HAN}[,;:?!.()]|[,;:?!()]{HAN}")


def pairs(path: Path) -> list[tuple[str, str]]:
    """The English and the Chinese text of each Markdown cell."""
    text = path.read_text(encoding="utf-8")
    english = nbformat.read(chinese.english_notebook(text), as_version=4)
    cells = zip(english.cells, read(text).cells, strict=True)
    return [(a.source, b.source) for a, b in cells if a.cell_type == "markdown"]


def plain(text: str) -> str:
    """The text without blocks of code, displayed formulas, emphasis and link targets."""
    text = re.sub(r"^```.*?^```|\$\$.*?\$\$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=\S)\*+|\*+(?=\S)", "", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def test_nothing_is_stale() -> None:
    assert stale() == []


def test_every_notebook_has_a_translation() -> None:
    texts = [path.read_text(encoding="utf-8") for path in TRANSLATIONS]
    assert [chinese.english_notebook(text) for text in texts] == NOTEBOOKS


@pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: path.name)
def test_formulas_code_and_links_are_the_english_ones(path: Path) -> None:
    for english, translated in pairs(path):
        assert differences(english, translated) == [], translated.splitlines()[0]


@pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: path.name)
def test_code_and_outputs_are_the_english_ones(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    english = nbformat.read(chinese.english_notebook(text), as_version=4)
    for cell, same in zip(english.cells, read(text).cells, strict=True):
        assert cell.cell_type == "markdown" or cell == same


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_all_formulas_code_and_links(page: str) -> None:
    """They may have more: the index has a table of terms."""
    english = (DOCS / PAGES[page][0]).read_text(encoding="utf-8")
    english = re.sub(r"```\{toctree.*?```", "", english, flags=re.DOTALL)
    translated = (DOCS / page).read_text(encoding="utf-8")
    missing = [line for line in differences(english, translated) if "English" in line]
    assert missing == []


def test_every_exercise_is_told() -> None:
    page = (DOCS / "zh" / "exercises.md").read_text(encoding="utf-8")
    for path in sorted((DOCS / "exercises").glob("exercise_*.py")):
        told = page.split(f"<!-- exercises/{path.name} ")[1].split("<!--")[0]
        functions = re.findall(r"^def (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert re.findall(r"^- `(\w+)`\uff1a", told, re.MULTILINE) == functions


@pytest.mark.parametrize(
    "path", [*TRANSLATIONS, *(DOCS / page for page in PAGES)], ids=lambda path: path.name
)
def test_spaces_and_punctuation(path: Path) -> None:
    text = plain(path.read_text(encoding="utf-8"))
    assert [text[max(0, m.start() - 8) : m.end() + 8] for m in UNEVEN.finditer(text)] == []


@pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: path.name)
def test_check_lists_have_as_many_points(path: Path) -> None:
    for english, translated in pairs(path):
        assert english.count("\n- [ ] ") == translated.count("\n- [ ] ")


def test_a_changed_cell_is_found() -> None:
    text = TRANSLATIONS[0].read_text(encoding="utf-8")
    first = next(iter(translations(text)))
    with pytest.raises(ValueError, match=rf"cell 0 \(# 1\. .*key {first}: it is new"):
        read(text.replace(first, key("another text")))
    with pytest.raises(ValueError, match="no cell for the translations 01234567"):
        read(text + "\n<!-- 01234567 -->\n多余的译文\n")
    with pytest.raises(ValueError, match="starts with the comment"):
        read("# 没有指明笔记本\n")


def test_a_key_that_is_there_twice_is_an_error() -> None:
    text = TRANSLATIONS[0].read_text(encoding="utf-8")
    first = next(iter(translations(text)))
    with pytest.raises(ValueError, match=f"{first} is there twice"):
        read(text + f"\n<!-- {first} -->\n重复的译文\n")


@pytest.mark.parametrize(
    ("english", "translated", "found"),
    [
        ("$m$ is large", "$l$ 很大", ["formulas: $l$ is only in the Chinese", "$m$ is only in"]),
        ("call `merge`", "调用 `update`", ["`?merge`? is only in the English", "update is only"]),
        ("[a](../b.py)", "[a](../c.py)", ["links: ../b.py is only in the English", "../c.py"]),
        (r"$\text{through } o$", r"$\text{经由 } o$", []),
        ("[notebook 2](2_online_softmax.ipynb)", "[第 2 篇](2_online_softmax.zh.md)", []),
        ("```bash\nls\n```\n", "```bash\npwd\n```\n", ["ls", "pwd"]),
    ],
)
def test_differences(english: str, translated: str, found: list[str]) -> None:
    told = differences(english, translated)
    assert len(told) == len(found)
    for pattern in found:
        assert re.search(pattern.replace("$", r"\$"), "\n".join(told))
