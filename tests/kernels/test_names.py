"""The kernels use what every Triton from 3.6 to 3.9 exports."""

import ast
from pathlib import Path

import pytest

import flashlayer.kernels

# Looked up in triton.language of 3.6.0, 3.7.1, 3.8.0 and 3.9.0. `to_tensor`, which 3.6 lacks, once
# kept every kernel from compiling there. Check a new name in all four before it comes in.
KNOWN = {
    *("abs", "arange", "cdiv", "constexpr", "dot", "exp", "exp2", "float64", "full", "int64"),
    *("expand_dims", "load", "log", "max", "maximum", "min", "minimum", "num_programs", "philox"),
    *("broadcast_to", "program_id", "range", "reshape", "static_range"),
    *("store", "sum", "trans", "uint32", "uint8", "where", "zeros"),
}

# Of triton.experimental.gluon.language, looked up in 3.6.0, 3.7.1, 3.8.0 and 3.9.0. What differs
# between them is in gluon_api.
KNOWN_OF_GLUON = {
    *("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout", "load"),
    "SwizzledSharedLayout",
    *("allocate_shared_memory", "arange", "constexpr", "convert_layout", "exp2", "float32", "full"),
    *("int32", "int64", "log2", "max", "maximum", "minimum", "static_range", "store"),
    *("sum", "warp_specialize", "where"),
}


@pytest.mark.parametrize(("module", "known"), [("tl", KNOWN), ("gl", KNOWN_OF_GLUON)])
def test_names_of_the_oldest_triton(module: str, known: set[str]) -> None:
    used = {
        node.attr
        for path in Path(flashlayer.kernels.__path__[0]).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == module
    }
    assert used == known


def test_gluon_is_imported_in_one_file() -> None:
    importing = {
        path.name
        for path in Path(flashlayer.kernels.__path__[0]).glob("*.py")
        if "from triton.experimental" in path.read_text()
    }
    assert importing == {"gluon_api.py"}
