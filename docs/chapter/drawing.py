"""Style of the chapter's plots."""

from __future__ import annotations

import matplotlib.pyplot as plt

# Okabe and Ito's colours, distinguishable for colour-blind readers.
BLUE, ORANGE, GREEN, PINK, SKY, AMBER = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)


def set_style() -> None:
    """Set font sizes for a phone and a white background for dark pages."""
    plt.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PINK, SKY, AMBER]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 140,
            "figure.figsize": (7, 3.5),
            "font.size": 11,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "savefig.facecolor": "white",
        }
    )
