"""The page "Masks": its pictures are drawn from today's builders, and it shows all of them."""

from pathlib import Path

import pytest

from docs.masks import DRAWN, FOLDER, draw
from flashlayer import masks

PAGE = (Path(__file__).parent.parent.parent / "docs" / "masks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_fresh(name: str) -> None:
    message = "renew it with `python docs/masks.py`"
    picture = FOLDER / f"{name}.svg"
    assert picture.read_text(encoding="utf-8") == draw(DRAWN[name]), message
    assert f"(masks/{name}.svg)" in PAGE


def test_every_builder_is_shown() -> None:
    builders = set(masks.__all__) - {"IntervalMask"}
    assert {name for name in builders if f"masks.{name}(" in PAGE} == builders
