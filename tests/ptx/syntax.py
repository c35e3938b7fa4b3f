"""Text to statements (PTX ISA 4, Syntax, and 4.3, Statements)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.ptx.formats import EmulatorError, UnknownInstruction

Scopes = tuple[int, ...]
"""The braces around a statement, outermost first; names are looked up from the innermost on."""


@dataclass
class Instruction:
    """One statement of a function's body.

    Attributes:
        opcode: with all its modifiers, ``"ld.global.v4.b32"``.
        operands: as written; vectors in braces and addresses in brackets stay whole.
        guard: the predicate it is executed under (9.3), with ``!`` where negated.
        scopes: where its names are looked up.
        text: the whole statement, for messages.
    """

    opcode: str
    operands: list[str]
    guard: str | None
    scopes: Scopes
    text: str

    @property
    def parts(self) -> list[str]:
        """Mnemonic and modifiers: ``["ld", "global", "v4", "b32"]``."""
        return self.opcode.split(".")

    def unknown(self) -> UnknownInstruction:
        """The error that names this instruction."""
        return UnknownInstruction(self.text)


@dataclass
class Entry:
    """A kernel's head: its name, (name, type) of its parameters, threads, and where the body is."""

    name: str
    parameters: list[tuple[str, str]]
    threads: int
    body: str


_STATEMENT = re.compile(
    r"\s*(?:(\})|(\{)|([\w$]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)",
    re.S,
)
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[(?:[^\]{]|\{[^}]*\})*\]|[^,{\[])+")
_INSTRUCTION = re.compile(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", re.S)


def entry(text: str) -> Entry:
    """The one ``.entry`` of a module; comments and debugging directives are dropped.

    Raises:
        EmulatorError: If there is none, or more than one.
    """
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file|pragma|section)\b[^\n]*$", "", text, flags=re.M)
    heads = list(re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", text, re.S))
    if len(heads) != 1:
        raise EmulatorError(f"a module of one .entry is expected, this one has {len(heads)}")
    (head,) = heads
    parameters = []
    for line in head[2].split(","):
        words = line.split()
        if words:
            array = re.fullmatch(r"(\w+)\[(\d+)\]", words[-1])
            kind = words[1].lstrip(".")
            parameters.append((array[1], "blob") if array else (words[-1], kind))
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    return Entry(head[1], parameters, int(threads[1]) if threads else 0, text[head.end() :])


def statements(body: str) -> Iterator[tuple[Scopes, str, str]]:
    """(scopes, label, statement) of a function's body; one of the last two is empty."""
    scopes, count, position = (0,), 0, 0
    while scopes:
        # At the start of a statement a brace opens a scope; inside of one it holds a vector.
        found = _STATEMENT.match(body, position)
        if found is None:
            raise EmulatorError(f"can't parse {body[position : position + 80]!r}")
        position = found.end()
        closing, opening, label, statement = found.groups()
        if closing:
            scopes = scopes[:-1]
        elif opening:
            count += 1
            scopes = (*scopes, count)
        elif label:
            yield scopes, label, ""
        elif statement.strip():
            yield scopes, "", " ".join(statement.split())


def instruction(scopes: Scopes, statement: str) -> Instruction:
    """A statement as an instruction."""
    found = _INSTRUCTION.fullmatch(statement)
    if found is None:
        raise EmulatorError(f"can't parse {statement!r}")
    return Instruction(found[2], operands(found[3]), found[1], scopes, statement)


def operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    return [x.strip() for x in _OPERAND.findall(text) if x.strip()]


def vector(text: str) -> list[str]:
    """The elements of ``{a, b}``, or ``a`` alone."""
    return [x.strip() for x in text.strip().strip("{}").split(",")]
