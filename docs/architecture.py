"""Draws docs/architecture.svg, the map of the package, from its imports.

``python docs/architecture.py`` writes the picture; ``tests/docs/test_map.py`` fails while
the committed one is stale. A room is a file of ``flashlayer`` or one of its folders; in
``backends`` every backend is a room of its own. Arrows point from a room to what it imports.
An arrow that a chain of others implies is left out, so that few enough are left to follow.

The layout is Sugiyama's: rooms stand on levels so that every arrow points down, an arrow over
several levels gets a waypoint on each, and the order on a level is chosen for few crossings. It
depends on the imports alone, so the same imports give the same bytes.
"""

from __future__ import annotations

import ast
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flashlayer"
PICTURE = ROOT / "docs" / "architecture.svg"

# Rooms that one call enters, in this order; the picture numbers them.
WAY = ("functional", "problem", "backends", "autograd", "backends/triton", "kernels")

Graph = dict[str, set[str]]

# Sizes in pixels, and the widths of a character of each font size, on average.
LINE, BOX_PADDING, GAP, LEVEL_GAP, MARGIN = 15, 9, 22, 46, 16
NAME_CHARACTER, FILE_CHARACTER, FILES_WIDTH = 8.2, 6.3, 26


def room_of(module: Sequence[str]) -> str:
    """The room of ``flashlayer.<module>``; ``()`` is the package's own ``__init__``."""
    if module[:1] == ("backends",):
        return "/".join(module[:2])
    return module[0] if module else ""


def modules() -> dict[tuple[str, ...], Path]:
    """Every module of the package by its dotted name in parts, without ``flashlayer``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


def imported_names(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Names below ``flashlayer`` that a file imports anywhere, but under ``TYPE_CHECKING``."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        top, *rest = name.split(".")
        if top == "flashlayer":
            yield tuple(rest)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from imported_names(child)


def read_imports() -> Graph:
    """For every room the rooms that it imports.

    Raises:
        ValueError: a file imports a public name from ``flashlayer`` itself, which hides the room.
    """
    known = modules()
    graph: Graph = {room_of(module): set() for module in known if module}
    for module, path in known.items():
        if not module:
            continue
        for name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
            target = next(name[:n] for n in range(len(name), -1, -1) if name[:n] in known)
            if not target:
                raise ValueError(f"{path}: import {name} from the file that defines it")
            graph[room_of(module)].add(room_of(target))
    for room, targets in graph.items():
        targets.discard(room)
    return graph


def reachable(graph: Graph, room: str) -> set[str]:
    """Rooms that ``room`` imports, directly or through others."""
    found: set[str] = set()
    waiting = [room]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def reduce(graph: Graph) -> Graph:
    """The graph without the edges that a chain of others implies.

    Raises:
        ValueError: rooms import each other.
    """
    below = {room: reachable(graph, room) for room in graph}
    if circular := sorted(room for room in graph if room in below[room]):
        raise ValueError(f"rooms import each other: {', '.join(circular)}")
    return {
        room: {x for x in targets if not any(x in below[other] for other in targets)}
        for room, targets in graph.items()
    }


def levels(graph: Graph) -> dict[str, int]:
    """The level of every room, 0 at the top: one below the lowest room that imports it."""
    found: dict[str, int] = {}

    def height(room: str) -> int:
        """Length of the longest chain of imports from here."""
        return max((1 + height(target) for target in graph[room]), default=0)

    top = max(map(height, graph))
    importers: Graph = {room: {x for x in graph if room in graph[x]} for room in graph}
    for room in sorted(graph, key=height, reverse=True):
        above = [found[x] for x in importers[room]]
        # What nothing imports stands as low as its own imports allow.
        found[room] = max(above) + 1 if above else top - height(room)
    return found


class Layout:
    """Rooms and waypoints by level, in the order and at the places where they are drawn."""

    def __init__(self, graph: Graph) -> None:
        self.level = levels(graph)
        self.lines = {room: describe(room) for room in graph}
        self.rows: list[list[str]] = [[] for _ in range(max(self.level.values()) + 1)]
        for room in sorted(graph):
            self.rows[self.level[room]].append(room)
        self.paths: list[list[str]] = []
        for room in sorted(graph):
            for target in sorted(graph[room]):
                between = range(self.level[room] + 1, self.level[target])
                points = [f"{room}>{target}@{level}" for level in between]
                for level, point in zip(between, points, strict=True):
                    self.rows[level].append(point)
                self.paths.append([room, *points, target])
        self.up: dict[str, list[str]] = {x: [] for row in self.rows for x in row}
        self.down: dict[str, list[str]] = {x: [] for row in self.rows for x in row}
        for path in self.paths:
            for a, b in itertools.pairwise(path):
                self.down[a].append(b)
                self.up[b].append(a)
        self._order()
        self.x = self._place()

    def width(self, node: str) -> float:
        """Width of a room's box; a waypoint is narrow."""
        if node not in self.lines:
            return 2.0
        name, *files = self.lines[node]
        widths = [NAME_CHARACTER * len(name), *(FILE_CHARACTER * len(line) for line in files)]
        return round(max(widths) + 2 * BOX_PADDING + 16)

    def height(self, node: str) -> float:
        """Height of a room's box, of one line at least."""
        return LINE * len(self.lines.get(node, [""])) + 2 * BOX_PADDING

    def _order(self) -> None:
        """Sort every level by where its neighbours are, down and up, and keep the best order."""
        best, fewest = [list(row) for row in self.rows], self._crossings()
        for sweep in range(40):
            upwards = sweep % 2 == 1
            neighbours = self.down if upwards else self.up
            for row in reversed(self.rows) if upwards else self.rows:
                place = {x: i for other in self.rows for i, x in enumerate(other)}
                mean = {
                    x: sum(place[n] / len(self.rows[self._row(n)]) for n in neighbours[x])
                    / len(neighbours[x])
                    if neighbours[x]
                    else place[x] / len(row)
                    for x in row
                }
                row.sort(key=lambda x: (mean[x], x))
            if (crossings := self._crossings()) < fewest:
                best, fewest = [list(row) for row in self.rows], crossings
        self.rows = best

    def _row(self, node: str) -> int:
        return int(node.split("@")[1]) if "@" in node else self.level[node]

    def _crossings(self) -> int:
        count = 0
        for upper, lower in itertools.pairwise(self.rows):
            place = {x: i for i, x in enumerate(lower)}
            ends = [sorted(place[y] for y in self.down[x]) for x in upper]
            count += sum(
                b < a
                for i, left in enumerate(ends)
                for right in ends[i + 1 :]
                for a in left
                for b in right
            )
        return count

    def _place(self) -> dict[str, float]:
        """Centers: near the mean of the neighbours, in order, without overlap."""
        x: dict[str, float] = {}
        for row in self.rows:
            x |= spread([0.0] * len(row), [self.width(node) for node in row], row)
        for sweep in range(60):
            rows = self.rows if sweep % 2 else list(reversed(self.rows))
            for row in rows:
                wanted = []
                for node in row:
                    near = self.up[node] + self.down[node]
                    wanted.append(sum(x[n] for n in near) / len(near) if near else x[node])
                x |= spread(wanted, [self.width(node) for node in row], row)
        left = min(x[node] - self.width(node) / 2 for node in x)
        return {node: center - left + MARGIN for node, center in x.items()}


def spread(wanted: list[float], widths: list[float], row: list[str]) -> dict[str, float]:
    """The centers closest to the wanted ones that keep the order and ``GAP`` between boxes.

    Isotonic regression: neighbours that would overlap are pooled and share the mean of what they
    want.
    """
    offsets = [0.0]
    for a, b in itertools.pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + GAP)
    pools: list[tuple[float, int]] = []  # mean of wanted minus offset, and how many share it
    for want, offset in zip(wanted, offsets, strict=False):
        mean, count = want - offset, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return {node: m + offset for node, m, offset in zip(row, means, offsets, strict=False)}


def describe(room: str) -> list[str]:
    """What a room's box says: its name and, for a folder, the names of its files."""
    folder = PACKAGE / room
    if room == "backends":
        return ["backends/__init__.py"]
    if not folder.is_dir():
        return [f"{room}.py"]
    names = sorted(
        f"{path.name}/" if path.is_dir() else path.stem
        for path in folder.iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    )
    return [f"{room}/", *textwrap.wrap(", ".join(names), FILES_WIDTH)]


def color(room: str, graph: Graph) -> str:
    """A tint by what the room is for."""
    if room == "kernels":
        return "#EBD2E0"
    if room.startswith("backends"):
        return "#B0DCCB"
    if room not in {"functional", *reachable(graph, "functional")}:
        return "#B3D5E8"
    return "#F5D391" if graph[room] else "#E6EAEE"


KEY = (
    ("#B3D5E8", "uses the functions"),
    ("#F5D391", "every call"),
    ("#B0DCCB", "backends"),
    ("#EBD2E0", "Triton kernels"),
    ("#E6EAEE", "imports none of the others"),
)


def draw(graph: Graph) -> str:
    """The picture, as the text of an SVG file."""
    layout = Layout(reduce(graph))
    tops, y = [], float(MARGIN)
    for row in layout.rows:
        tops.append(y)
        y += max(layout.height(node) for node in row) + LEVEL_GAP
    width = max(layout.x[n] + layout.width(n) / 2 for row in layout.rows for n in row) + MARGIN
    height = y - LEVEL_GAP + 44
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="Helvetica, Arial, sans-serif">',
        "<title>The rooms of flashlayer and what they import</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="#777"/>'
        "</marker></defs>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        *(curve(layout, path, tops) for path in layout.paths),
    ]
    for room in sorted(graph):
        lines += box(layout, room, tops[layout.level[room]], color(room, graph))
    lines += key(height - 24)
    return "\n".join([*lines, "</svg>\n"])


def curve(layout: Layout, path: list[str], tops: list[float]) -> str:
    """An arrow from the bottom of the first room through the waypoints to the top of the last."""
    x, row = layout.x, layout._row
    first, last = path[0], path[-1]
    points = [(x[first], tops[row(first)] + layout.height(first))]
    for point in path[1:-1]:
        # Straight down through the whole level, so that the arrow passes between its boxes.
        level_height = max(layout.height(node) for node in layout.rows[row(point)])
        points += [(x[point], tops[row(point)]), (x[point], tops[row(point)] + level_height)]
    points.append((x[last], tops[row(last)]))
    d = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        d += f" C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}"
    return f'<path d="{d}" fill="none" stroke="#777" stroke-width="1.2" marker-end="url(#tip)"/>'


def box(layout: Layout, room: str, top: float, fill: str) -> Iterator[str]:
    """A room: its box, its name, its files and, on the way of a call, its number."""
    width, height, center = layout.width(room), layout.height(room), layout.x[room]
    left = center - width / 2
    yield (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}" rx="4" '
        f'fill="{fill}" stroke="#555" stroke-width="0.8"/>'
    )
    for number, line in enumerate(layout.lines[room]):
        style = 'font-size="14" font-weight="bold"' if number == 0 else 'font-size="12"'
        y = top + BOX_PADDING + LINE * number + 12
        at = f'x="{center:.0f}" y="{y:.0f}" text-anchor="middle"'
        yield f"<text {at} {style}>{escape(line)}</text>"
    if room in WAY:
        yield f'<circle cx="{left:.0f}" cy="{top:.0f}" r="10" fill="#D55E00"/>'
        yield (
            f'<text x="{left:.0f}" y="{top + 4:.0f}" text-anchor="middle" font-size="12" '
            f'font-weight="bold" fill="white">{WAY.index(room) + 1}</text>'
        )


def key(y: float) -> Iterator[str]:
    """What the tints mean."""
    x = float(MARGIN)
    for fill, meaning in KEY:
        yield (
            f'<rect x="{x:.0f}" y="{y:.0f}" width="14" height="14" rx="3" fill="{fill}" '
            'stroke="#555" stroke-width="0.8"/>'
        )
        yield f'<text x="{x + 20:.0f}" y="{y + 11:.0f}" font-size="12">{meaning}</text>'
        x += 20 + FILE_CHARACTER * len(meaning) + GAP


if __name__ == "__main__":
    PICTURE.write_text(draw(read_imports()), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
