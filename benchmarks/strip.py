"""Takes the code of every option that is off out of a kernel's source: it proves such code is free.

An option that is off reaches a kernel as None or False, and Triton folds the branches that ask for
it. That this costs nothing is shown by comparison with a kernel in which those branches are not
even written: :func:`stripped` puts the constants in the place of their parameters, folds
conditions, drops branches that can't run, names that only ever held such a constant and parameters
nobody reads any more, and does the same in every helper that is called with such a constant.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton

_UNKNOWN = object()


def _value(node: ast.expr) -> Any:
    """The None, True or False that an expression is for certain; else ``_UNKNOWN``."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool)):
        return node.value
    return _UNKNOWN


class _Fold(ast.NodeTransformer):
    """Puts known names' constants in their place and drops what can't run."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.known:
            return ast.Constant(self.known[node.id])
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.Is | ast.IsNot):
            left, right = _value(node.left), _value(node.comparators[0])
            if left is not _UNKNOWN and right is not _UNKNOWN:
                return ast.Constant((left is right) == isinstance(node.ops[0], ast.Is))
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        value = _value(node.operand)
        if isinstance(node.op, ast.Not) and value is not _UNKNOWN:
            return ast.Constant(not value)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        # A kernel's conditions have no side effects: one operand can settle the whole.
        decides = isinstance(node.op, ast.Or)
        rest = []
        for operand in node.values:
            value = _value(operand)
            if value is _UNKNOWN:
                rest.append(operand)
            elif bool(value) == decides:
                return ast.Constant(decides)
        if not rest:
            return ast.Constant(not decides)
        return rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        value = _value(node.test)
        return node if value is _UNKNOWN else node.body if value else node.orelse

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        node.test = self.visit(node.test)
        value = _value(node.test)
        branches = (node.body, node.orelse)
        if value is not _UNKNOWN:
            return self.block(branches[not value])
        node.body, node.orelse = map(self.block, branches)
        return node

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        results: list[ast.stmt] = []
        for statement in statements:
            result = self.visit(statement)
            results += result if isinstance(result, list) else [result]
        return results


class _Drop(ast.NodeTransformer):
    """Drops assignments to names whose constant has taken their place, and docstrings."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Assign(self, node: ast.Assign) -> ast.Assign | None:
        target = node.targets[0]
        return None if isinstance(target, ast.Name) and target.id in self.names else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign | None:
        return None if isinstance(node.target, ast.Name) and node.target.id in self.names else node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.stmt) and getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


def _reads(function: ast.FunctionDef) -> set[str]:
    nodes = itertools.chain.from_iterable(map(ast.walk, function.body))
    return {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}


def _stores(function: ast.FunctionDef) -> Counter[str]:
    """How often each name gets a value: by the call, where it is a parameter, or by a statement."""
    names = (x for x in ast.walk(function) if isinstance(x, ast.Name))
    stored = [x.id for x in names if isinstance(x.ctx, ast.Store)]
    return Counter([*stored, *(x.arg for x in function.args.args)])


def _constants(function: ast.FunctionDef) -> dict[str, Any]:
    """Names that are assigned once and hold None, True or False from then on."""
    stores = _stores(function)
    found = {}
    for node in ast.walk(function):
        target, value = None, None
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        if isinstance(target, ast.Name) and value is not None and stores[target.id] == 1:
            constant = _value(value)
            if constant is not _UNKNOWN:
                found[target.id] = constant
    return found


def _definition(kernel: triton.JITFunction) -> ast.FunctionDef:
    """A function as it is written, without the defaults of its parameters."""
    function = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    if arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
        raise NotImplementedError(f"{function.name}: only plain parameters are understood")
    arguments.defaults = []
    return function


def _defaults(kernel: triton.JITFunction) -> dict[str, ast.expr]:
    """What a call passes for the parameters that it doesn't mention."""
    return {
        x.name: ast.parse(repr(getattr(x.default, "value", x.default)), mode="eval").body
        for x in kernel.params
        if x.has_default
    }


class _Stripper:
    """Collects the stripped functions: one for each helper and the constants it is called with."""

    def __init__(self) -> None:
        self.functions: dict[tuple[Any, ...], ast.FunctionDef] = {}
        self.globals: dict[str, Any] = {}

    def strip(self, kernel: triton.JITFunction, known: dict[str, Any]) -> ast.FunctionDef:
        """The function without ``known`` parameters, and without those that nobody reads then."""
        key = (kernel.fn, *sorted(known.items()))
        if key in self.functions:
            return self.functions[key]
        function = _definition(kernel)
        constants = dict(known)
        while constants:
            function.body = _Fold(constants).block(function.body)
            stores = _stores(function)
            if twice := {name for name in constants if stores[name] > 1}:
                # A parameter that gets another value stays one, and is given its first.
                return self.strip(kernel, {k: v for k, v in known.items() if k not in twice})
            _Drop(set(constants)).visit(function)
            constants = _constants(function)
        _Drop(set()).visit(function)
        self._specialise_calls(function, kernel.fn.__globals__)
        reads = _reads(function)
        function.args.args = [x for x in function.args.args if x.arg in reads]
        kept = {x.arg for x in function.args.args}
        for decorator in function.decorator_list:
            for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
                if keyword.arg is not None and keyword.arg.startswith("do_not_specialize"):
                    value = keyword.value
                    listed = (
                        kernel.fn.__globals__[value.id]
                        if isinstance(value, ast.Name)
                        else ast.literal_eval(value)
                    )
                    names = [x for x in listed if x in kept]
                    keyword.value = ast.parse(repr(names), mode="eval").body
        taken = {x.name for x in self.functions.values()}
        names = itertools.chain(
            [function.name], (f"{function.name}_{n}" for n in itertools.count(2))
        )
        function.name = next(name for name in names if name not in taken)
        self.functions[key] = function
        for name in {x.id for x in ast.walk(function) if isinstance(x, ast.Name)}:
            if name in kernel.fn.__globals__:
                self.globals.setdefault(name, kernel.fn.__globals__[name])
        return function

    def _specialise_calls(self, function: ast.FunctionDef, scope: dict[str, Any]) -> None:
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            helper = scope.get(node.func.id)
            if not isinstance(helper, triton.JITFunction):
                continue
            names = [x.name for x in helper.params]
            starred = any(isinstance(x, ast.Starred) for x in node.args)
            if starred or any(x.arg is None for x in node.keywords):
                raise NotImplementedError(f"{function.name}: starred arguments of {helper}")
            given = dict(zip(names, node.args, strict=False))
            given |= {x.arg: x.value for x in node.keywords if x.arg is not None}
            given = _defaults(helper) | given
            known = {
                name: _value(value)
                for name, value in given.items()
                if _value(value) is not _UNKNOWN
            }
            stripped = self.strip(helper, known)
            node.func.id = stripped.name
            node.args = []
            node.keywords = [ast.keyword(x.arg, given[x.arg]) for x in stripped.args.args]


class Source(NamedTuple):
    """A kernel's source with its helpers', and what it takes from where it was written."""

    name: str
    text: str
    globals: dict[str, Any]


def strip_source(kernel: triton.JITFunction, arguments: Mapping[str, Any]) -> Source:
    """The source of a kernel without the code of the options that ``arguments`` leave off.

    Raises:
        ValueError: If the name of a parameter that is gone is left anywhere in the source.
        NotImplementedError: If the source does what this module does not understand.
    """
    values = {x.name: arguments.get(x.name, x.default) for x in kernel.params}
    off = {name: x for name, x in values.items() if x is None or x is False}
    stripper = _Stripper()
    function = stripper.strip(kernel, off)
    module = ast.Module([*stripper.functions.values()], type_ignores=[])
    text = ast.unparse(ast.fix_missing_locations(module))
    names = {x.id for x in ast.walk(module) if isinstance(x, ast.Name)}
    names |= {x.arg for x in ast.walk(module) if isinstance(x, ast.arg | ast.keyword) and x.arg}
    gone = values.keys() - {x.arg for x in function.args.args}
    if left := names & (gone | off.keys()):
        raise ValueError(f"{kernel.__name__} still knows {sorted(left)}")
    return Source(function.name, text, stripper.globals)


def stripped(
    kernel: triton.JITFunction, arguments: Mapping[str, Any], folder: Path
) -> tuple[triton.JITFunction, dict[str, Any], str]:
    """A kernel without the code of the options that ``arguments`` leave off.

    Args:
        kernel: the kernel.
        arguments: what it is launched with, by name, launch options among them.
        folder: where to write the module of the stripped source, which Triton reads back.

    Returns:
        The stripped kernel, the arguments that it still has, and its source.

    Raises:
        ValueError, NotImplementedError: As :func:`strip_source`.
    """
    source = strip_source(kernel, arguments)
    path = folder / f"{source.name}_stripped.py"
    path.write_text(f"{source.text}\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    vars(loaded).update(source.globals)
    spec.loader.exec_module(loaded)
    result = getattr(loaded, source.name)
    launch_options = arguments.keys() - {x.name for x in kernel.params}
    wanted = launch_options | {x.name for x in result.params}
    given = {x.name: x.default for x in kernel.params if x.has_default} | dict(arguments)
    return result, {k: v for k, v in given.items() if k in wanted}, source.text
