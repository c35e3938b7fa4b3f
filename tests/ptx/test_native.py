"""The cases of ``make test`` again, through Triton's own driver and C launcher."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ptx.cases import QUICK, names
from tests.ptx.processes import results

pytestmark = pytest.mark.slow

CASES = [(arch, name) for arch in (80, 90) for name in names(arch, QUICK)]


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``launched(arch)``: the results by case."""
    from tests.ptx.native import compiler

    if compiler() is None:
        pytest.skip("Triton's launcher needs a C compiler: there is no gcc, clang or CC")
    return lambda arch: results(tmp_path_factory, "native", arch)


@pytest.mark.parametrize(("arch", "case"), CASES, ids=lambda x: str(x))
def test_arguments_arrive_as_the_c_launcher_packs_them(launched: Any, arch: int, case: str) -> None:
    result = launched(arch)[case]
    assert result["passed"], result["message"]
    assert result["executed"] > 0
