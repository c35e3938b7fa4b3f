"""Draws the pictures of the page "Masks", one for each builder of :mod:`flashlayer.masks`.

``python docs/masks.py`` writes them to docs/masks/; ``tests/docs/test_masks.py`` fails while one
is stale. Queries run down, keys across; a key's intervals are its coloured stretches.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask

from flashlayer import masks
from flashlayer.masks import IntervalMask

FOLDER = Path(__file__).parent / "masks"

S, CELL, MARGIN = 24, 9, 1
VISIBLE, HIDDEN, LINE = "#3b7dbf", "#8884", "#8888"

_IDS = torch.tensor([0] * 7 + [1] * 11 + [2] * 6)
_IMAGES = torch.tensor([0] * 4 + [1] * 6 + [0] * 5 + [2] * 6 + [0] * 3)
_CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()

# The masks as they are applied: documents and chunks once alone and once with causal=True.
DRAWN: dict[str, IntervalMask] = {
    "documents": masks.documents(_IDS),
    "documents_causal": masks.documents(_IDS) & masks.from_dense(_CAUSAL),
    "prefix_lm": masks.prefix_lm(9, seqlen=S),
    "blocks_bidirectional": masks.blocks_bidirectional(_IMAGES),
    "chunks": masks.chunks(8, seqlen=S) & masks.from_dense(_CAUSAL),
    "tree": masks.tree(
        torch.tensor([-1, 0, 1, 2, 3, 4, 5, 5, 7, 8, 9, 5, 11, 12, 4, 14, 15, 16, 15, 18, 19])
    ),
    "global_and_window": masks.global_and_window(3, 5, seqlen=S),
    "global_and_window_both_ways": masks.global_and_window(3, (4, 4), seqlen=S),
    "from_block_mask": masks.from_block_mask(
        create_block_mask(lambda b, h, i, j: (i - j).abs() < 7, 1, 1, S, S, device="cpu")
    ),
}


def draw(mask: IntervalMask) -> str:
    """The mask as SVG."""
    size = max(mask.seqlen_q, mask.seqlen_k)
    side = size * CELL + 2 * MARGIN
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" '
        f'width="{side}" height="{side}" role="img">',
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{size * CELL}" height="{size * CELL}" '
        f'fill="{HIDDEN}" stroke="{LINE}"/>',
    ]
    for key in range(mask.seqlen_k):
        ends = mask.intervals[0, 0, :, key].tolist()
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            if start < stop:
                x, y, height = MARGIN + key * CELL, MARGIN + start * CELL, (stop - start) * CELL
                place = f'x="{x}" y="{y}" width="{CELL - 1}" height="{height - 1}"'
                shapes.append(f'<rect {place} fill="{VISIBLE}"/>')
    return "\n".join((*shapes, "</svg>\n"))


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    for name, mask in DRAWN.items():
        (FOLDER / f"{name}.svg").write_text(draw(mask), encoding="utf-8")


if __name__ == "__main__":
    main()
