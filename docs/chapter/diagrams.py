"""Boxes and arrows for diagrams; the style of plots is in :mod:`drawing`."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

# Light tints of drawing's colours, for text on top of them.
LIGHT_BLUE, LIGHT_AMBER, LIGHT_GREEN, LIGHT_PINK = "#B3D5E8", "#F5D391", "#B0DCCB", "#EBD2E0"
PALE, GREY = "#E6EAEE", "#777777"

Point = tuple[float, float]


def canvas(axes: Axes, x: Point, y: Point) -> None:
    """Set the limits ``x`` and ``y`` of the axes and hide ticks and frame."""
    axes.set(xlim=x, ylim=y)
    axes.axis("off")


def box(
    axes: Axes, corner: Point, size: Point, color: str, text: str = "", **style: object
) -> None:
    """A coloured box with centered text; ``style`` is passed to the text."""
    axes.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor="white"))
    middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
    axes.text(*middle, text, ha="center", va="center", **style)


def frame(axes: Axes, corner: Point, size: Point, color: str) -> None:
    """An outline that highlights an area."""
    axes.add_patch(
        Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=2, clip_on=False)
    )


def arrow(axes: Axes, start: Point, end: Point) -> None:
    """An arrow from one point to another."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=GREY))
