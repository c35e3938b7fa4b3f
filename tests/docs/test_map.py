"""The architecture page: its picture is drawn from today's imports, its lists are complete."""

import re
from pathlib import Path

import pytest

from docs import architecture
from docs.architecture import PICTURE, draw, levels, reachable, read_imports, reduce, spread

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def named_paths(text: str) -> set[str]:
    """Files and folders that a text names, as they are written."""
    return set(re.findall(r"`((?:[\w<>.]+/)*[\w<>]+(?:\.py|/)|(?:[\w.]+/)+[\w.]+\.md)`", text))


def test_the_picture_is_fresh() -> None:
    message = "renew it with `python docs/architecture.py`"
    assert PICTURE.read_text(encoding="utf-8") == draw(read_imports()), message


def test_every_arrow_points_down_and_none_is_lost() -> None:
    graph = read_imports()
    reduced, level = reduce(graph), levels(graph)
    for room, targets in graph.items():
        assert targets <= reachable(reduced, room)
        assert all(level[target] > level[room] for target in targets)


def test_an_import_makes_the_picture_stale() -> None:
    graph = read_imports()
    before = draw(graph)
    graph["philox"].add("online_softmax")
    assert draw(graph) != before


def test_rooms_that_import_each_other_are_told() -> None:
    with pytest.raises(ValueError, match="import each other: a, b"):
        reduce({"a": {"b"}, "b": {"a"}, "c": set()})


def test_boxes_keep_their_order_and_their_distance() -> None:
    x = spread([5.0, 0.0, 400.0], [100.0, 100.0, 100.0], ["a", "b", "c"])
    assert x["b"] - x["a"] == 100 + architecture.GAP
    assert x["a"] + x["b"] == 5 + 0  # overlapping boxes share the error
    assert x["c"] == 400


def test_every_file_of_the_package_is_on_the_map() -> None:
    rows = section("The map")
    for room in read_imports():
        path = {"backends": "backends/__init__.py"}.get(room)
        folder = (architecture.PACKAGE / room).is_dir()
        assert f"| `{path or (room + '/' if folder else room + '.py')}` |" in rows, room


def test_what_may_be_imported_is_what_the_table_says() -> None:
    """A room's third column names every room that it imports."""
    graph = read_imports()
    for row in section("The map").splitlines():
        if not row.startswith("| `"):
            continue
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        room = cells[0].strip("`").removesuffix("/").removesuffix(".py").removesuffix("/__init__")
        allowed = set(re.findall(r"`(\w+)`", cells[2]))
        if "the backends" in cells[2]:
            allowed.add("backends")
        used = {target.split("/")[0] for target in graph[room]}
        assert used - {room.split("/")[0]} <= allowed, room


def test_named_files_exist() -> None:
    for path in named_paths(PAGE):
        if "<" not in path:
            assert (ROOT / path).exists() or (ROOT / "flashlayer" / path).exists(), path


def test_the_recipe_for_a_score_modification_names_every_file() -> None:
    """The softcap is its example: each file of the package that has it is named, and no other."""
    recipe = section("Add a score modification")
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "flashlayer").rglob("*.py")
        if "softcap" in path.read_text()
    }
    named = {path for path in named_paths(recipe) if path.startswith("flashlayer/")}
    assert files <= named
    assert named <= files
    tests = {path for path in named_paths(recipe) if path.startswith(("tests/", "benchmarks/"))}
    for path in tests:
        assert "softcap" in (ROOT / path).read_text(), path
