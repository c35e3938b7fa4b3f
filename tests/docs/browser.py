"""Runs the site's JavaScript in headless Chromium; in Node what needs no page."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from docs.browser import chromium, find_chromium

NODE = shutil.which("node")


def browse(*arguments: str) -> str:
    """What Chromium prints; skips the test where there is none."""
    try:
        return chromium(*arguments)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def evaluate(scripts: Sequence[Path], expression: str, *, page: str | None = None) -> Any:
    """The value of a JavaScript expression after the scripts, as JSON brings it here.

    Args:
        scripts: loaded in this order.
        expression: may be a call of a function with any statements in it.
        page: HTML that the scripts find; with None they need no document, and Node will do.
    """
    if page is None and NODE is not None and find_chromium() is None:
        code = "\n".join(script.read_text(encoding="utf-8") for script in scripts)
        code += f"\nconsole.log(JSON.stringify({expression}));"
        result = subprocess.run([NODE, "-"], input=code, check=True, capture_output=True, text=True)
        return json.loads(result.stdout)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        loads = "".join(f'<script src="{script.as_uri()}"></script>' for script in scripts)
        path.write_text(
            f"""<!doctype html><meta charset="utf-8"><body>
            <script>const errors = []; onerror = (message) => {{ errors.push(message); }};</script>
            {page or ""}{loads}
            <script>let answer = null; answer = {expression};</script>
            <script>const told = document.createElement("pre");
            told.textContent = JSON.stringify({{ answer, errors }});
            document.body.replaceChildren(told);</script>""",
            encoding="utf-8",
        )
        told = re.search(r"<pre>(.*)</pre>", browse("--dump-dom", path.as_uri()), re.DOTALL)
    assert told is not None
    answer = json.loads(html.unescape(told[1]))
    assert answer["errors"] == []
    return answer["answer"]
