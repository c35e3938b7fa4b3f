"""The page about exported graphs, run as it is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs/graphs.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Inductor's
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="AOTInductor needs a C++ compiler",
)
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # in torch 2.11's load
def test_the_layer_exported_saved_and_compiled_ahead_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    page: dict[str, Any] = {}
    exec(example, page)
    layer, compiled = page["layer"], page["compiled"]
    loaded = torch.export.load("layer.pt2").module()
    for batch, length in ((1, 2), (2, 9), (3, 300)):
        x = torch.randn(batch, length, 64)
        expected = layer(x)
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-6)
