"""A module's text to a program (PTX ISA 4.3, Statements, and 11.1, ``.entry``)."""

from __future__ import annotations

from tests.ptx import (
    matrix_instructions,  # noqa: F401  these three register how instructions are decoded
    memory_instructions,  # noqa: F401
    register_instructions,  # noqa: F401
    syntax,
)
from tests.ptx.decode import Decoder, Program
from tests.ptx.formats import EmulatorError


def parse(text: str) -> Program:
    """Decode the one kernel of a PTX module.

    Raises:
        UnknownInstruction: With the statement, where an instruction is not implemented.
        EmulatorError: If the text can't be parsed.
    """
    head = syntax.entry(text)
    decoder = Decoder(head.parameters, head.body)
    label = ""
    for scopes, new_label, statement in syntax.statements(head.body):
        if new_label:
            label = new_label
            decoder.label(scopes, label)
        elif statement.startswith(".reg"):
            decoder.declare(scopes, statement)
        elif statement.startswith(".branchtargets"):
            decoder.tables[label] = syntax.operands(statement.removeprefix(".branchtargets"))
        elif statement.startswith("."):
            raise EmulatorError(f"unknown directive {statement!r}")
        else:
            decoder.add(syntax.instruction(scopes, statement))
    return Program(
        name=head.name,
        parameters=head.parameters,
        blocks=decoder.finish(),
        registers=decoder.registers,
        constants=decoder.constants,
        granule=decoder.granule,
        counts=decoder.counts,
        threads=head.threads,
        ptx=text,
    )
