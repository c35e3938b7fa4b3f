"""The kernels use what every Triton from 3.6 to 3.9 exports."""

import ast
from pathlib import Path

import flashlayer.kernels

# Looked up in triton.language of 3.6.0, 3.7.1, 3.8.0 and 3.9.0. `to_tensor`, which 3.6 lacks, once
# kept every kernel from compiling there. Check a new name in all four before it comes in.
KNOWN = {
    *("abs", "arange", "cdiv", "constexpr", "dot", "exp", "exp2", "float64", "full", "int64"),
    *("expand_dims", "load", "log", "max", "maximum", "min", "minimum", "philox", "program_id"),
    *("broadcast_to", "range", "reshape", "static_range"),
    *("store", "sum", "trans", "uint32", "uint8", "where", "zeros"),
}


def test_names_of_the_oldest_triton() -> None:
    used = {
        node.attr
        for path in Path(flashlayer.kernels.__path__[0]).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "tl"
    }
    assert used == KNOWN
