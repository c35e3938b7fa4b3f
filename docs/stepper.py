"""Records what the Triton kernels do on small problems, for the stepper's page to replay.

The shipped kernels run in Triton's interpreter, which runs a kernel as Python. A trace function
reads a kernel's local variables after each statement that :data:`STEPS` names, and the statement's
lines. Loads and stores are counted where the interpreter does them. ``python docs/stepper.py``
writes the record; ``tests/docs/test_stepper.py`` fails when it is stale.
"""

from __future__ import annotations

import ast
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import numpy as np
import torch
from latex2mathml.converter import convert
from torch import Tensor

import flashlayer
from flashlayer import flash_attention, flash_attention_varlen
from flashlayer.backends import split_keys

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "docs" / "_static" / "stepper" / "record.js"
PREFIX = "const STEPPER_RECORD = "
TILE = 4  # queries and keys of a tile: few enough to read every number
DIM, VALUE_DIM = 4, 2

# After which statement of which function there is a step, its kind, and what it shows: names of the
# record and of local variables. A statement is written as its targets and the function it calls.
Step = tuple[str, dict[str, str]]
STEPS: dict[str, dict[str, Step]] = {
    "forward_kernel": {
        "acc = zero_tiles": ("init", {"m": "m_i", "l": "l_i", "acc": "acc"}),
        "ranges = key_tile_ranges": ("ranges", {}),
        "k_tile = load_stream": ("load", {}),
        "scores = dot_rows": ("scores", {"tile": "scores"}),
        "x = tl.where": ("mask", {"tile": "x", "visible": "visible"}),
        "store_tiles(o)": ("out", {"out": "stored"}),
        "tl.store(lse)": ("lse", {"lse": "stored"}),
        "return": ("missing", {}),
    },
    "tile_exponents": {"m_new = tl.maximum": ("max", {"m": "m_new"})},
    "online_softmax_update": {
        "rescale = tl.exp2": ("rescale", {"rescale": "rescale"}),
        "p = tl.exp2": ("p", {"tile": "p"}),
        "l_i": ("sum", {"l": "l_i"}),
        "acc = dot_into": ("acc", {"acc": "acc"}),
    },
    "merge_kernel": {
        "m = tl.where": ("parts_max", {"parts": "lse", "m": "m"}),
        "weights = tl.exp": ("parts_p", {"weights": "weights"}),
        "acc": ("parts_sum", {"l": "l", "acc": "acc"}),
        "tl.store(out)": ("parts_out", {"out": "stored"}),
        "tl.store(total)": ("parts_lse", {"lse": "stored"}),
    },
    "delta_kernel": {
        "tl.store(delta)": ("delta", {"delta": "stored"}),
        "tl.store(shift)": ("shift", {"lse": "stored"}),
    },
    "dkdv_kernel": {
        "dv_acc = zero_tiles": ("init_dkdv", {"dk": "dk_acc", "dv": "dv_acc"}),
        "ranges = query_tile_ranges": ("ranges", {}),
        "q_tile = load_stream": ("load", {}),
        "scores = dot_rows": ("scores", {"tile": "scores"}),
        "p, tanh_score = probabilities": ("rebuild", {"tile": "p", "visible": "visible"}),
        "dv_acc = dot_into": ("dv", {"dv": "dv_acc"}),
        "dp = dot_rows": ("dp", {"tile": "dp"}),
        "ds = score_gradient": ("ds", {"tile": "ds"}),
        "dk_acc = dot_into": ("dk", {"dk": "dk_acc"}),
        "store_tiles(dk)": ("dk_out", {"dk": "stored"}),
        "store_tiles(dv)": ("dv_out", {"dv": "stored"}),
    },
    "dq_kernel": {
        "dq_acc = zero_tiles": ("init_dq", {"dq": "dq_acc", "shift": "shift", "delta": "delta"}),
        "ranges = key_tile_ranges": ("ranges", {}),
        "k_tile = load_stream": ("load", {}),
        "scores = dot_rows": ("scores", {"tile": "scores"}),
        "p, tanh_score = probabilities": ("rebuild", {"tile": "p", "visible": "visible"}),
        "dp = dot_rows": ("dp", {"tile": "dp"}),
        "ds = score_gradient": ("ds", {"tile": "ds"}),
        "dq_acc = dot_into": ("dq", {"dq": "dq_acc"}),
        "store_tiles(dq)": ("dq_out", {"dq": "stored"}),
    },
}
# What each kind of step computes, in LaTeX.
FORMULAS = {
    "init": r"m_i = \mathrm{lowest} \qquad l_i = 0 \qquad \mathrm{acc}_i = 0",
    "ranges": r"i + \mathrm{offset} - \mathrm{left} \le j \le i + \mathrm{offset} + \mathrm{right}",
    "scores": r"s_{ij} = q_i \cdot k_j",
    "mask": r"s_{ij} = -\infty \quad \text{if } j \notin \mathrm{visible}(i)",
    "max": r"m^{\mathrm{new}}_i = \max\left(m_i, \max_j s_{ij}\right)",
    "rescale": r"\alpha_i = e^{m_i - m^{\mathrm{new}}_i} = 2^{(m_i - m^{\mathrm{new}}_i) \log_2 e}",
    "p": r"p_{ij} = e^{s_{ij} - m^{\mathrm{new}}_i}",
    "sum": r"l^{\mathrm{new}}_i = \alpha_i \, l_i + \sum_j p_{ij}",
    "acc": r"\mathrm{acc}^{\mathrm{new}}_i = \alpha_i \, \mathrm{acc}_i + \sum_j p_{ij} \, v_j",
    "out": r"o_i = \mathrm{acc}_i / l_i",
    "lse": r"\mathrm{LSE}_i = m_i + \log\, l_i",
    "parts_max": r"m = \max_t \mathrm{LSE}_t",
    "parts_p": r"w_t = e^{\mathrm{LSE}_t - m}",
    "parts_sum": r"l = \sum_t w_t \qquad \mathrm{acc} = \sum_t w_t \, o_t",
    "parts_out": r"o = \mathrm{acc} / l",
    "parts_lse": r"\mathrm{LSE} = m + \log\, l",
    "delta": r"\delta_i = o_i \cdot do_i",
    "rebuild": r"p_{ij} = e^{s_{ij} - \mathrm{LSE}_i}",
    "dv": r"dv_j \leftarrow dv_j + \sum_i p_{ij} \, do_i",
    "dp": r"dp_{ij} = do_i \cdot v_j",
    "ds": r"ds_{ij} = p_{ij} \, (dp_{ij} - \delta_i)",
    "dk": r"dk_j \leftarrow dk_j + \sum_i ds_{ij} \, q_i",
    "dq": r"dq_i \leftarrow dq_i + \sum_j ds_{ij} \, k_j",
    "init_dkdv": r"dk_j = 0 \qquad dv_j = 0",
    "init_dq": r"dq_i = 0",
    "dk_out": r"dk_j \leftarrow \mathrm{scale} \cdot dk_j",
    "dq_out": r"dq_i \leftarrow \mathrm{scale} \cdot dq_i",
    # In exponents of 2, with the terms of a row's sum in four places t.
    "half_max": r"m^{\mathrm{new}}_i = \max\left(m_i, \log_2 e \, \max_j s_{ij}\right)",
    "half_rescale": r"\alpha_i = 2^{m_i - m^{\mathrm{new}}_i}",
    "half_p": r"p_{ij} = 2^{s_{ij} \log_2 e - m^{\mathrm{new}}_i}",
    "half_sum": r"l^{\mathrm{new}}_{it} = \alpha_i \, l_{it} + \sum_{j \in t} p_{ij}",
    "half_out": r"o_i = \mathrm{acc}_i / \sum_t l_{it}",
    "half_lse": r"\mathrm{LSE}_i = m_i \log 2 + \log\, l_i",
}
FILES = ("kernels/forward.py", "kernels/backward.py", "kernels/merge.py")
KEYS_OF_TILE = ("k_start", "k_length", "BLOCK_N")
RANGES = ("left", "full", "right")  # LEFT_EDGE, FULL, RIGHT_EDGE


def array(value: Any) -> np.ndarray:
    """A tensor of torch or of the interpreter; column tiles side by side."""
    if isinstance(value, tuple):
        return np.concatenate([array(tile) for tile in value], 1)
    if isinstance(value, Tensor):
        return value.detach().numpy().copy()
    return np.array(value.handle.data if hasattr(value, "handle") else value)


def integer(value: Any) -> int:
    """A scalar of the interpreter, or of the compile time."""
    return int(array(getattr(value, "value", value)).item())


def coded(value: Any) -> Any:
    """As JSON, which has no infinity: numbers of five digits, or else strings."""
    if isinstance(value, np.ndarray):
        return coded(value.tolist())
    if isinstance(value, dict):
        return {name: coded(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [coded(x) for x in value]
    if not isinstance(value, float):
        return int(value) if isinstance(value, bool) else value
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e6 else rounded


class Source:
    """One file: the statements of the functions that STEPS names, by line."""

    def __init__(self, name: str):
        self.path = Path(flashlayer.__file__).parent / name
        text = self.path.read_text(encoding="utf-8")
        self.statements: dict[str, dict[int, ast.stmt]] = {}
        self.listings: dict[str, dict[str, Any]] = {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name in STEPS:
                self.statements[node.name] = {
                    line: part
                    for part in ast.walk(node)
                    if isinstance(part, ast.Assign | ast.AugAssign | ast.Expr | ast.Return)
                    for line in range(part.lineno, (part.end_lineno or 0) + 1)
                }
                first = node.body[1].lineno if ast.get_docstring(node) else node.body[0].lineno
                lines = text.splitlines()[first - 1 : node.end_lineno]
                self.listings[node.name] = {"file": name, "first": first, "lines": lines}


def written(statement: ast.stmt) -> str:
    """A statement as STEPS writes it."""
    match statement:
        case ast.Return():
            return "return"
        case ast.Expr(value=ast.Call(func=called, args=[_, what, *_])):
            return f"{ast.unparse(called)}({ast.unparse(what)})"
        case ast.Assign(targets=[target], value=ast.Call(func=called)):
            return f"{ast.unparse(target).strip('()')} = {ast.unparse(called)}"
        case ast.Assign(targets=[target]) | ast.AugAssign(target=target):
            return ast.unparse(target)
    return ""


class Recorder:
    """Collects the programs that run and their steps.

    Args:
        q: the queries of the call, ``(1, H, Sq, D)`` or packed ``(T, H, D)``.
        k: its keys, likewise.
        parts: ranges that they are split into.
    """

    def __init__(self, q: Tensor, k: Tensor, parts: int):
        self.q, self.k, self.parts = q, k, parts
        self.programs: list[dict[str, Any]] = []
        self.hit: set[tuple[str, str]] = set()
        self.bytes = [0, 0]  # loaded and stored by the program
        self.stored = np.zeros(0)  # by its last store
        self.line: dict[FrameType, int] = {}  # at which each running frame is

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record what the kernels do meanwhile."""
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        load, store = Builder.create_masked_load, Builder.create_masked_store

        def counted_load(builder: Any, pointers: Any, mask: Any, *args: Any) -> Any:
            self.count(0, pointers, mask)
            return load(builder, pointers, mask, *args)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            self.count(1, pointers, mask)
            self.stored = value.data.copy()
            return store(builder, pointers, value, mask, *args)

        before = sys.gettrace()
        with (
            mock.patch.object(Builder, "create_masked_load", counted_load),
            mock.patch.object(Builder, "create_masked_store", counted_store),
        ):
            sys.settrace(self.enter)
            try:
                yield
            finally:
                sys.settrace(before)

    def count(self, direction: int, pointers: Any, mask: Any) -> None:
        """Count the bytes of a load or store."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self.bytes[direction] += size * int(np.count_nonzero(mask.data))

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Follow the functions of STEPS; a kernel that starts is a program."""
        source = SOURCES.get(frame.f_code.co_filename)
        name = frame.f_code.co_name
        if source is None or name not in source.statements:
            return None
        if name.endswith("_kernel"):
            self.bytes = [0, 0]
            self.programs.append({"kernel": name, "steps": []})
        return self.follow

    def follow(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Where another statement starts, or the function returns, one is done."""
        statements = SOURCES[frame.f_code.co_filename].statements[frame.f_code.co_name]
        done = statements.get(self.line.pop(frame, 0))
        if event == "line":
            self.line[frame] = frame.f_lineno
            if done is statements.get(frame.f_lineno):  # another of its lines
                return self.follow
        if done is not None and event in ("line", "return"):
            self.record(frame, done)
        return self.follow

    def record(self, frame: FrameType, statement: ast.stmt) -> None:
        """Add the step after a statement, if there is one."""
        function, text = frame.f_code.co_name, written(statement)
        if text not in STEPS[function]:
            return
        self.hit.add((function, text))
        kind, shown = STEPS[function][text]
        program, variables = self.programs[-1], frame.f_locals
        placed = function.endswith("_kernel") and function != "merge_kernel"
        if placed and "at" not in program and kind != "missing":
            program |= self.place(function, variables)
        step: dict[str, Any] = {"kind": kind, "bytes": list(self.bytes)}
        step["lines"] = [function, statement.lineno, statement.end_lineno]
        if kind == "ranges":
            step["ranges"] = [[integer(x) for x in pair] for pair in variables["ranges"]]
        if kind == "load":
            step |= self.tile(program, variables)
        for field, variable in shown.items():
            value = self.stored if variable == "stored" else variables[variable]
            if value is not None:
                step[field] = self.cut(program, field, array(value))
        program["steps"].append(step)

    def place(self, kernel: str, of: dict[str, Any]) -> dict[str, Any]:
        """The rows and the head of a program; ``of`` are its variables.

        ``at`` are the first row and their number, counted in the whole call; a program's sequence,
        or its part of the keys, starts at ``base``.
        """
        if kernel == "delta_kernel":
            return {"at": [0, integer(of["seqlen_q"])], "head": integer(of["head"])}
        if kernel == "dkdv_kernel":
            base = [integer(of["q_begin"]), integer(of["k_begin"])]
            start, stop = base[1] + integer(of["k_start"]), base[1] + integer(of["k_stop"])
            head = integer(of["kv_head"])
        else:
            base = [row(of["q_ptr"], self.q), row(of["k_ptr"], self.k)]
            start, stop = base[0] + integer(of["q_start"]), base[0] + integer(of["q_stop"])
            head = integer(of["head"])
        return {"at": [start, stop - start], "head": head, "base": base}

    def tile(self, program: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
        """The keys, in dK/dV the queries, of the tile that a program comes to."""
        over_queries = program["kernel"] == "dkdv_kernel"
        start, stop, size = ("q_start", "stop", "BLOCK_M") if over_queries else KEYS_OF_TILE
        first = integer(of[start])
        count = max(0, min(integer(of[size]), integer(of[stop]) - first))
        at = [program["base"][0 if over_queries else 1] + first, count]
        return {"at": at, "head": integer(of["head"]), "range": RANGES[integer(of["RANGE"])]}

    def cut(self, program: dict[str, Any], field: str, value: np.ndarray) -> np.ndarray:
        """Without the rows and columns that only fill up a block; tiles with queries down."""
        if program["kernel"] == "merge_kernel":  # of one query
            widths = {
                "acc": VALUE_DIM,
                "out": VALUE_DIM,
                "parts": self.parts,
                "weights": self.parts,
            }
            value = value.ravel()[: widths.get(field, 1)]
            return value[None] if field in ("acc", "out") else value
        value = value[: program["at"][1]]
        if field in ("tile", "visible"):
            count = next(s["at"][1] for s in reversed(program["steps"]) if s["kind"] == "load")
            value = value[:, :count]
            return value.T if program["kernel"] == "dkdv_kernel" else value
        widths = {"acc": VALUE_DIM, "out": VALUE_DIM, "dv": VALUE_DIM, "dq": DIM, "dk": DIM}
        return value[:, : widths[field]] if field in widths else value


def row(pointer: Any, x: Tensor) -> int:
    """The row of ``x`` that a pointer into it points to."""
    elements = (integer(pointer) - x.data_ptr()) // x.element_size()
    return elements // x.stride(0) if x.ndim == 3 else elements % x.stride(1) // x.stride(2)


def numbers(seed: int, *shape: int) -> Tensor:
    """Multiples of 1/2 from -2 to 2: their products are exact, and short to read."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator) / 2


def dense(queries: int, keys: int, heads: int = 1, kv_heads: int = 1) -> tuple[Tensor, ...]:
    """q, k and v ``(1, heads, length, DIM or VALUE_DIM)``."""
    q = numbers(1, 1, heads, queries, DIM)
    return q, numbers(2, 1, kv_heads, keys, DIM), numbers(3, 1, kv_heads, keys, VALUE_DIM)


def huge_logit() -> tuple[Tensor, ...]:
    """Scores of key 5 for queries 1 and 2 whose ``exp`` overflows fp32."""
    q, k, v = dense(4, 8)
    k[0, 0, 5] = q[0, 0, 2] * 24
    return q, k, v


def presets() -> dict[str, dict[str, Any]]:
    """The problems by name: arguments of the call, and what else is to be done."""
    edges = torch.tensor([0, 3, 10], dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in dense(10, 10)]  # (T, 1, columns)
    q, k, v = dense(8, 8)
    flat = (q / 2, k, v)  # no key has nearly all of the weight, so gradients are not nearly 0
    return {
        "full": {"tensors": dense(8, 12)},
        "causal": {"tensors": dense(12, 12), "options": {"causal": True}},
        "window": {"tensors": dense(12, 12), "options": {"window_size": (3, 1)}},
        "group": {"tensors": dense(4, 8, heads=2)},
        "packed": {"tensors": packed, "options": {"cu_seqlens_q": edges, "causal": True}},
        "unseen": {"tensors": dense(8, 3), "options": {"causal": True}},
        "huge": {"tensors": huge_logit(), "naive": True},
        "split": {"tensors": dense(1, 12), "parts": 2},
        "half": {"tensors": [x.half() for x in dense(4, 12)], "half": True},
        "backward": {"tensors": flat, "options": {"causal": True}, "backward": True},
        "edges": {
            "tensors": flat,
            "options": {"causal": True, "window_size": (4, 0)},
            "backward": True,
        },
    }


def run(preset: dict[str, Any]) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """The record of one preset, and the statements of STEPS that it came to."""
    from flashlayer.kernels import tiles

    def small(kernel: str, *_: Any) -> tiles.TileConfig:
        keys = 8 if preset.get("half") else TILE  # the least for four sums of a row
        return tiles.TileConfig(TILE, keys, num_warps=4, num_stages=1)

    q, k, v = (x.clone() for x in preset["tensors"])
    recorder = Recorder(q, k, preset.get("parts", 1))
    attend = flash_attention if q.ndim == 4 else flash_attention_varlen
    tensors = {"q": q, "k": k, "v": v}
    for x in tensors.values():
        x.requires_grad_(preset.get("backward", False))
    with (
        mock.patch.object(tiles, "tile_config", small),
        mock.patch.object(tiles, "delta_rows", return_value=q.shape[-2]),
        mock.patch.object(split_keys, "num_splits", return_value=preset.get("parts", 1)),
        recorder.running(),
    ):
        options = {"scale": 1.0, "return_lse": True, "backend": "triton"}
        out, lse = attend(q, k, v, **options, **preset.get("options", {}))
        if q.requires_grad:
            recorder.programs.clear()  # the forward pass is what the other presets show
            do = numbers(4, *out.shape)
            out.backward(do)
            tensors |= {"do": do, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    tensors["out"] = out
    by_head = {
        name: array(x[0] if q.ndim == 4 else x.swapaxes(0, 1)) for name, x in tensors.items()
    }
    by_head["lse"] = array(lse if q.ndim == 3 else lse[0])
    made = {"half": preset.get("half", False), "parts": preset.get("parts", 1)}
    made |= {"tensors": by_head, "programs": recorder.programs}
    if preset.get("naive"):
        exp = (q @ k.transpose(2, 3)).exp()
        total = exp.sum(3, keepdim=True)
        made["naive"] = {"exp": array(exp[0, 0]), "sum": array(total[0, 0, :, 0])}
        made["naive"]["out"] = array((exp / total @ v)[0, 0])
    return made, recorder.hit


def record() -> dict[str, Any]:
    """All presets, and the sources of the functions in them.

    Raises:
        LookupError: a statement of STEPS was never reached: the kernels have changed.
    """
    made, hit = {}, set()
    for name, preset in presets().items():
        made[name], steps = run(preset)
        hit |= steps
    for function, steps in STEPS.items():
        for text in steps:
            if (function, text) not in hit:
                raise LookupError(f"{function} never came to a statement {text!r}")
    listings = {name: x for source in SOURCES.values() for name, x in source.listings.items()}
    formulas = {kind: convert(latex, display="block") for kind, latex in FORMULAS.items()}
    return coded({"sources": listings, "formulas": formulas, "presets": made})


SOURCES = {str(source.path): source for source in map(Source, FILES)}


def text(recorded: dict[str, Any]) -> str:
    """The record as a script, since a page opened from a file may load no JSON; a preset a line."""

    def members(of: dict[str, str]) -> str:
        return "{" + ",\n".join(f'"{name}":{json}' for name, json in of.items()) + "}"

    def compact(of: dict[str, Any]) -> dict[str, str]:
        return {name: json.dumps(x, separators=(",", ":")) for name, x in of.items()}

    parts = compact(recorded) | {"presets": members(compact(recorded["presets"]))}
    return f"{PREFIX}{members(parts)};\n"


if __name__ == "__main__":
    RECORD.write_text(text(record()), encoding="utf-8")
    print(f"{RECORD.relative_to(ROOT)}: {RECORD.stat().st_size:,} bytes")
