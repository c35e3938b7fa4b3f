"""Writes docs/compatibility.md: ``python -m tests.integrations.transformers.compatibility``.

Each cell of the table is what :func:`tests.integrations.transformers.situations.outcome` found.
"""

import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.integrations.transformers.hosts import HOSTS
from tests.integrations.transformers.situations import SITUATIONS, outcome
from tests.integrations.transformers.sweep import read_outcomes

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"

INTRODUCTION = """\
# flashlayer in Hugging Face transformers

Written by `python -m tests.integrations.transformers.compatibility` with transformers
{transformers} and torch {torch}; the tests compare every cell with what they find. Each model is
tiny, random and built from its config. It runs with eager attention in fp64 and in fp32, and with
flashlayer in fp32; flashlayer may be off from fp64 by twice what eager fp32 is, in gradients by
three times (`flashlayer.testing`) and two roundings of the result.

- `no padding`, `left padding`, `right padding`: logits, loss and the gradient of every parameter.
- `packed`: the same, sequences one after the other in a row, told by restarting `position_ids`;
  `cu_seq_lens`: told by `cu_seq_lens_q/k` too. Eager has each sequence in a row of its own.
- `greedy`, `beam search`, `static cache`: the generated tokens and the logits of every step, with
  padding. `chunked prefill`: the logits of a prompt that comes in three pieces, into a dynamic and
  into a static cache.

*passes*: within the bound, and no mask of Sq x Sk was made. *passes, dense mask*: within the
bound, with a bool mask (B, 1, Sq, Sk). *-*: the model has no such thing. A number is a refusal,
quoted below the table.

"""

AFTER = """
Masks are O(Sk) wherever transformers composes them of functions of `masking_utils`:

- causal, full and sliding masks, with padding, in every model: `window_size` and a row of padding
  (B, 1, 1, Sk);
- packed sequences, in every causal model: `cu_seqlens`, and under `torch.compile` an interval mask;
- chunks, with padding, a past and packed sequences too (Llama 4): an interval mask;
- images that see each other, also in a sliding window (Gemma 3, Gemma 4 and what else passes
  `block_sequence_ids` or `blockwise_overlay`): an interval mask;
- a prefix that sees itself (PaliGemma): an interval mask;
- a prompt in a static cache whose position is a tensor, under `torch.compile`: an interval mask.

An interval mask (`flashlayer.masks.IntervalMask`) has two int32 numbers for each key and row. Its
numbers are computed on the device without a synchronization, except that images and prefixes read
one bool: whether each block is contiguous.

What makes a dense bool mask: mask functions of your own or of a model's module (`or_mask_function`,
`and_mask_function`; Gemma 4's audio), a block of images or prefix in several places unless what is
between them is visible anyway, and images and prefixes under `torch.compile` of the whole model,
where that can't be read. A model that slices or combines its mask gets a dense one too. One
decoding step into a static cache, and one in chunks or behind images, has a mask of (B, 1, 1, Sk).
A `position_bias` (T5) is as large as its model makes it, Sq x Sk for each head; padding makes it
that for each row of the batch.

Packed sequences are told by `cu_seq_lens_q/k`, or by restarting `position_ids` and no
`attention_mask`, in any number of rows, compiled or not (flash_attention_2 looks at batches of 1
only). A sequence begins where a position is lower than the one before. A repeated 0 also begins one
(a sequence of one token), unless another position of the row repeats or all are 0. Gaps and other
repeats begin none. An `attention_mask`, be it of ones, rules packing out, as in eager.
Where transformers itself tells attention of packing (no `attention_mask` and no cache:
`use_cache=False`), its own rule holds, as in eager: any step other than +1 begins a sequence. With
the default cache, Llama 4's chunks are counted from the start of the row, as in eager, not from the
start of each sequence, and reach into the sequence before, as its attention is given no
`position_ids`; `use_cache=False` counts them from there.

What is refused, with the names of the model and the option: `output_attentions` as an argument or
in the config (the weights are never stored; GPT-2 doesn't hand the argument on, so there it gives
an empty tuple), paged caches (continuous batching), keys chosen query by query (`indices`,
`block_indices`), a sink for each query (`sinks`), `cu_seq_lens_q` next to padding, and a causal
model that makes no mask while queries and keys differ in number.

What is different from eager on purpose: a row of padding gives zeros, where eager averages all
values; and without an `attention_mask` restarting `position_ids` separate sequences in every causal
model, as with flash_attn, also where eager is not told (with a cache, and gpt-oss).

## Every model class

`python -m tests.integrations.transformers.sweep` builds a tiny model of every class that
transformers' auto classes know and compares its results with its own eager attention, without
padding, with padding on the right and on the left. Of {classes} classes:

| outcome | classes |
|---|---|
| as eager, through flashlayer | {equal} |
| as eager; they never ask for an attention function, and the name changes nothing | {own} |
| refused by name | {refused} |
| different | {different} |
| no tiny model could be built and run with eager attention | {unbuilt} |

A model that does not ask `ALL_ATTENTION_FUNCTIONS` for its attention has its own.
`set_attn_implementation` logs a warning then and changes nothing. Built with the name it is refused
with a `ValueError`: while it is built, if it chooses from a table of classes (GPT-Neo, GPT-J,
Falcon), and at the first forward if it reads the mask (Bloom, MPT, XGLM, Longformer). A mask can be
moved, sliced, joined and combined with `&`, `|` and `~`, and what comes out is guarded like the
mask. `torch.where(mask, ...)` and `masked_fill(~mask, ...)` are the readings of a bool mask; every
other one (arithmetic, casts, comparisons, reductions, indexing with it, writing to it) raises.
`attn_implementation={{"": "FlashLayer", "vision_config": "eager"}}` keeps a part eager. A layer
that says `is_causal` and has no mask is refused in models without SDPA (BridgeTower): eager takes
no notice of `is_causal`.

Types of the models that are refused:
{types}.
"""


def sweep_counts() -> dict[str, Any]:
    """What the committed outcomes of the sweep come to."""
    outcomes = read_outcomes()
    kinds = Counter(outcome.split(":")[0] for outcome in outcomes.values())
    refused = [outcome.split(":")[1] for outcome in outcomes.values() if outcome[:2] == "re"]
    types = sorted({f"`{reason.split()[0]}`" for reason in refused})
    return {
        "classes": len(outcomes),
        "equal": kinds["equal"],
        "own": kinds["own attention"],
        "refused": kinds["refused"],
        "different": kinds["different"] + kinds["error"],
        "unbuilt": kinds["not built"],
        "types": textwrap.fill(", ".join(types), 100, break_on_hyphens=False),
    }


def read_table() -> dict[tuple[str, str], str]:
    """``(model, situation)`` and what the committed page says, refusals in full."""
    lines = PAGE.read_text().splitlines()
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    table = lines[: lines.index("## Every model class")]
    rows = [line.strip("|").split("|") for line in table if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in row] for row in rows]
    return {
        (row[0], situation): notes.get(cell, cell)
        for row in body
        for situation, cell in zip(header[1:], row[1:], strict=True)
    }


def write_table(cells: dict[tuple[str, str], str]) -> None:
    """The page with these outcomes."""
    notes: list[str] = []
    lines = ["| | " + " | ".join(SITUATIONS) + " |", "|---" * (len(SITUATIONS) + 1) + "|"]
    for host in HOSTS:
        row = [host]
        for situation in SITUATIONS:
            cell = cells[host, situation]
            if cell.startswith("refused"):
                if cell not in notes:
                    notes.append(cell)
                cell = str(notes.index(cell) + 1)
            row.append(cell)
        lines.append("| " + " | ".join(row) + " |")
    quoted = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    page = INTRODUCTION.format(**versions) + "\n".join([*lines, "", *quoted]) + "\n"
    page += AFTER.format(**sweep_counts())
    PAGE.write_text(page)


if __name__ == "__main__":
    write_table({(host, s): outcome(host, s) for host in HOSTS for s in SITUATIONS})
