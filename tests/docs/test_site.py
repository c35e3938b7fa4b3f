"""The site builds without a warning, and its pages load nothing from the network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_named_function_leads_to_its_reference_or_listing(site: Path) -> None:
    page = (site / "api" / "online_softmax.html").read_text(encoding="utf-8")
    assert 'id="flashlayer.online_softmax.merge"' in page
    chapter = (site / "chapter" / "1_softmax.html").read_text(encoding="utf-8")
    assert 'href="../api/source.html#flashlayer-online-softmax-py"' in chapter


def test_primes_are_not_raised_twice(site: Path) -> None:
    """A prime set as an exponent is too small to see: m' would read m."""
    page = (site / "chapter" / "2_online_softmax.html").read_text(encoding="utf-8")
    assert "&#x02032;</mo>" in page
    assert "&#x02032;</mi>" not in page
