"""What transformers' mask functions mean, read from the closures that they are composed of.

In each pattern that they describe the queries that may attend to a key are one interval of
positions that contains the key's own, or there are none. An intersection of two such intervals is
one again, and so is a union. So whatever ``and_masks`` and ``or_masks`` make of them is one
interval a key: O(Sk) numbers, computed on the device.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer.integrations.transformers.packing import readable
from flashlayer.masks.builders import runs

# Functions of transformers.masking_utils that make the closures that are understood.
FACTORIES = (
    "and_masks",
    "or_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "chunked_overlay",
    "blockwise_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
)


class Keys(NamedTuple):
    """The keys of a mask: those at positions ``offset`` to ``offset + length - 1``."""

    queries: int  # how many
    length: int
    offset: int
    device: torch.device
    table: Tensor | None = None  # (B, length): positions as packed sequences count them

    def positions(self) -> Tensor:
        """``(B or 1, length)``: the position of each key, as the mask function counts."""
        if self.table is not None:
            return self.table
        return torch.arange(self.length, device=self.device)[None] + self.offset


class Pattern(NamedTuple):
    """Which keys are visible by a mask function: those that none of the fields hides.

    A window: ``left`` and ``right`` count keys beside the query's own. Packed sequences:
    ``sequences`` ``(B, S)`` numbers them, ``remapped`` means that positions are counted within
    them. And an interval of query positions for each key, ``(B or 1, Sk)``: ``starts`` to
    ``stops``, None for no bound, both the key's own position for no query.
    """

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None
    remapped: bool = False
    starts: Tensor | None = None
    stops: Tensor | None = None
    # starts and stops hide nothing from causal queries while all positions are below this one.
    idle_below: int = 0
    # Bool, as starts: further queries before and after the interval may attend to the key.
    more_before: Tensor | None = None
    more_after: Tensor | None = None


def recognise(mask_function: Callable, keys: Keys) -> Pattern | None:
    """The pattern of a mask function; None if one of the closures in it is unknown.

    Closures are recognised by the identity of their code, so a mask function that a later version
    builds differently gives a dense mask: slower, but correct.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function is causal_mask_function:
        return Pattern(right=0)
    if mask_function is bidirectional_mask_function:
        return Pattern()
    described: tuple[str, dict[str, Any]] | None
    if torch.compiler.is_compiling():
        described = getattr(mask_function, "flashlayer_made_of", None)
    else:
        described = _closure(mask_function)
    return None if described is None else _read(*described, keys)


def _closure(mask_function: Any) -> tuple[str, dict[str, Any]] | None:
    """The name of the function that made a closure, and the closure's variables."""
    code = getattr(mask_function, "__code__", None)
    name = _names().get(code)
    if code is None or name is None:
        return None
    cells = mask_function.__closure__ or ()
    return name, dict(zip(code.co_freevars, (x.cell_contents for x in cells), strict=True))


@functools.cache
def _names() -> dict[Any, str]:
    """By the code of a closure, the name of the function that makes it."""
    from transformers import masking_utils

    made: dict[Any, str] = {}
    for name in FACTORIES:
        constants = getattr(masking_utils, name).__code__.co_consts
        made |= {x: name for x in constants if isinstance(x, types.CodeType)}
    return {code: name for code, name in made.items() if code.co_argcount == 4}


@functools.cache
def describe_in_graphs() -> None:
    """Let Dynamo know what the closures are made of, as it can't read them.

    While it traces, each of ``FACTORIES`` is replaced by a copy of itself that notes its name and
    arguments on what it returns.
    """
    from transformers import masking_utils

    def substitute(name: str) -> None:
        original = getattr(masking_utils, name)
        code = original.__code__
        # A copy, for which Dynamo has no substitute.
        make = types.FunctionType(code, original.__globals__, name, original.__defaults__)
        names = code.co_varnames[: code.co_argcount]
        variadic = code.co_varnames[code.co_argcount] if not names else ""

        def described(*arguments: Any, **named: Any) -> Any:
            made: Any = make(*arguments, **named)
            given = {variadic: arguments} if variadic else dict(zip(names, arguments, strict=False))
            made.flashlayer_made_of = name, given | named
            return made

        # Once a process: another copy of this package, from the hub, notes the same.
        if not hasattr(original, "flashlayer_described"):
            torch.compiler.substitute_in_graph(original, skip_signature_check=True)(described)
            original.flashlayer_described = True

    for name in FACTORIES:
        substitute(name)


def _read(name: str, x: dict[str, Any], keys: Keys) -> Pattern | None:
    """The pattern of a closure with the variables ``x``."""
    if name == "and_masks":
        return _intersection([recognise(function, keys) for function in x["mask_functions"]])
    if name == "or_masks":
        return _union([recognise(function, keys) for function in x["mask_functions"]], keys)
    if name == "sliding_window_overlay":
        return Pattern(left=x["sliding_window"] - 1) if x["sliding_window"] >= 1 else None
    if name == "sliding_window_bidirectional_overlay":
        size = x["sliding_window"]
        return Pattern(left=size, right=size) if size >= 0 else None
    if name == "chunked_overlay":
        size, shift = x["chunk_size"], x["left_padding"].to(keys.device)[:, None]
        starts = (keys.positions() - shift) // size * size + shift
        return Pattern(starts=starts, stops=starts + size, idle_below=size)
    if name == "packed_sequence_mask_function":
        return Pattern(sequences=x["packed_sequence_mask"])
    if name == "blockwise_overlay":
        return _blocks(x["block_sequence_ids"].to(keys.device), keys)
    return _remapped(x["mask_function"], x["position_ids"], keys)


def _blocks(ids: Tensor, keys: Keys) -> Pattern | None:
    """Tokens of a block ``ids >= 0`` see each other; a block may be in several places."""
    # Whether it is in one place must be read; and one query's dense mask is O(Sk) too.
    if not readable(ids) or keys.queries == 1:
        return None
    if keys.table is None and ids.shape[1] < keys.offset + keys.length:
        return None
    token = torch.arange(ids.shape[1], device=ids.device)
    in_block = ids >= 0
    starts, stops = (torch.where(in_block, edge, token) for edge in runs(ids))
    more = (in_block & elsewhere for elsewhere in _elsewhere(ids))
    index = keys.positions().expand(ids.shape[0], -1)
    starts, stops, before, after = (x.gather(1, index) for x in (starts, stops, *more))
    return Pattern(starts=starts, stops=stops, more_before=before, more_after=after)


def _elsewhere(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a token's id occurs before and after its run too; bool ``(B, S)`` each."""
    starts, stops = runs(ids)
    ordered, order = ids.sort(dim=1, stable=True)
    # In this order tokens of one id are neighbours, and rise.
    first, last = runs(ordered)
    first, last = order.gather(1, first), order.gather(1, last - 1)
    first, last = (torch.empty_like(order).scatter(1, order, x) for x in (first, last))
    return first < starts, last >= stops


def _remapped(mask_function: Callable, table: Tensor, keys: Keys) -> Pattern | None:
    """Positions counted within packed sequences, where they rise by one."""
    if keys.table is not None or table.shape[1] != keys.length:
        return None
    inner = recognise(mask_function, keys._replace(table=table))
    if inner is None:
        return None
    shift = keys.positions() - table
    starts, stops = (None if x is None else x + shift for x in (inner.starts, inner.stops))
    return inner._replace(remapped=True, starts=starts, stops=stops)


def _all_given(patterns: list[Pattern], field: str) -> list[Any]:
    values = (getattr(pattern, field) for pattern in patterns)
    return [value for value in values if value is not None]


def _merged(values: list[Tensor], merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    return functools.reduce(merge, values) if values else None


def _intersection(patterns: list[Pattern | None]) -> Pattern | None:
    """The pattern whose keys are visible in all of them; None if one is unknown."""
    known = [pattern for pattern in patterns if pattern is not None]
    given = functools.partial(_all_given, known)
    if len(known) < len(patterns) or len(given("sequences")) > 1:
        return None
    bounded = [p.idle_below for p in known if p.starts is not None or p.stops is not None]
    return Pattern(
        left=min(given("left"), default=None),
        right=min(given("right"), default=None),
        sequences=next(iter(given("sequences")), None),
        remapped=any(pattern.remapped for pattern in known),
        starts=_merged(given("starts"), torch.maximum),
        stops=_merged(given("stops"), torch.minimum),
        idle_below=min(bounded, default=0),
        more_before=_merged(given("more_before"), torch.logical_or),
        more_after=_merged(given("more_after"), torch.logical_or),
    )


def _union(patterns: list[Pattern | None], keys: Keys) -> Pattern | None:
    """The pattern whose keys are visible in one of them; None if one is unknown."""
    folded = [None if pattern is None else in_intervals(pattern, keys) for pattern in patterns]
    known = [pattern for pattern in folded if pattern is not None]
    if len(known) < len(patterns) or not known:
        return None
    edges: list[Tensor | None] = []
    for edge, more, merge in (
        ("starts", "more_before", torch.minimum),
        ("stops", "more_after", torch.maximum),
    ):
        values = _all_given(known, edge)
        # Without a bound in one of them all queries on this side may attend.
        bounded = len(values) == len(known)
        edges.append(_merged(values, merge) if bounded else None)
        edges.append(_merged(_all_given(known, more), torch.logical_or) if bounded else None)
    starts, more_before, stops, more_after = edges
    return Pattern(starts=starts, stops=stops, more_before=more_before, more_after=more_after)


def in_intervals(pattern: Pattern, keys: Keys) -> Pattern | None:
    """The same pattern with no field but the intervals; None if it has positions of sequences."""
    sequences, parts = pattern.sequences, [pattern]
    if sequences is not None:
        if keys.table is not None or keys.offset != 0 or sequences.shape[1] != keys.length:
            return None
        if not pattern.remapped and not readable(sequences):
            return None
        starts, stops = runs(sequences.to(keys.device))
        # Those that transformers numbers itself are in one place each.
        more = (None, None) if pattern.remapped else _elsewhere(sequences.to(keys.device))
        parts.append(Pattern(starts=starts, stops=stops, more_before=more[0], more_after=more[1]))
    elif pattern.remapped:
        return None
    if pattern.right is not None:
        parts.append(Pattern(starts=keys.positions() - pattern.right))
    if pattern.left is not None:
        parts.append(Pattern(stops=keys.positions() + pattern.left + 1))
    whole = _intersection([part._replace(sequences=None) for part in parts])
    return None if whole is None else whole._replace(left=None, right=None, remapped=False)
