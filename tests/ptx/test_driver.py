"""How a launch's arguments become a kernel's parameters and the memory it may touch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver as triton_driver
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx import driver
from tests.ptx.asynchronous import TensorMap
from tests.ptx.formats import EmulatorError
from tests.ptx.memory import Memory
from tests.ptx.processes import environment


def flattened(kind: Any, value: Any, *maps: dict[str, Any]) -> tuple[list[Any], Memory]:
    memory, values = Memory(), []
    driver._flatten(kind, value, iter(maps), memory, values)
    return values, memory


def readable(memory: Memory, address: int) -> bool:
    try:
        memory.load(None, None, np.array([address]), np.uint32, 1)
    except EmulatorError:
        return False
    return True


def test_tuples_are_passed_by_element_and_constants_not_at_all() -> None:
    x = torch.zeros(4)
    kinds = ("*fp32", ("i32", "constexpr", ("i64",)), "constexpr", "fp64")
    values, memory = flattened(kinds, (x, (3, None, (5,)), 7, 0.5))
    assert values == [x.data_ptr(), 3, 5, 0.5]
    assert readable(memory, x.data_ptr() + 12)


def test_a_kernel_may_touch_the_elements_of_a_view_and_not_what_lies_between() -> None:
    whole = torch.zeros(8, 6)
    view = whole[1::2, :4]
    memory = Memory()
    driver.expose(memory, view)
    for row in range(8):
        for column in range(6):
            address = whole.data_ptr() + 4 * (6 * row + column)
            assert readable(memory, address) == (row % 2 == 1 and column < 4)
    driver.expose(memory, whole[0])
    assert readable(memory, whole.data_ptr() + 20)
    driver.expose(memory, torch.zeros(0))  # nothing to touch, no error


def test_a_descriptor_is_a_map_and_its_shape_and_strides() -> None:
    x = torch.zeros(2, 6, 64, dtype=torch.bfloat16)
    descriptor = TensorDescriptor(x, [2, 6, 64], [384, 64, 1], [1, 4, 32])
    meta = {"swizzle": 2, "elem_size": 2, "block_size": [1, 4, 32]}
    values, memory = flattened("tensordesc<bf16[1, 4, 32]>", descriptor, meta)
    tensor_map, *rest = values
    assert rest == [2, 6, 64, 384, 64, 1]
    assert tensor_map == TensorMap(
        address=x.data_ptr(),
        dtype=np.uint16,
        shape=[64, 6, 2],
        strides=[2, 128, 768],
        box=[32, 4, 1],
        swizzle=2,
    )
    assert readable(memory, x.data_ptr())


@pytest.mark.parametrize(
    ("grid", "scratch", "message"),
    [((2, 3, 1), 0, "a grid of one dimension"), ((1, 1, 1), 64, "scratch memory")],
)
def test_a_launch_that_the_driver_does_not_play_is_an_error(
    grid: tuple[int, int, int], scratch: int, message: str
) -> None:
    metadata = SimpleNamespace(global_scratch_size=scratch, profile_scratch_size=0)
    launcher = driver._Launcher(SimpleNamespace(signature={}), metadata)
    with pytest.raises(EmulatorError, match=message):
        launcher(*grid, 0, "", None, None, None, None)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_real_driver_and_backend_are_back_afterwards(arch: int) -> None:
    from flashlayer.backends import triton as backend

    before = triton_driver._active, backend.refuses, torch.cuda.get_device_capability
    with driver.emulated(arch) as device:
        assert triton_driver.active is device
        assert torch.cuda.get_device_capability() == divmod(arch, 10)
        assert device.get_current_target().arch == arch
    after = triton_driver._active, backend.refuses, torch.cuda.get_device_capability
    assert after == before


def test_the_child_has_no_interpreter_and_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    variables = environment(tmp_path)
    assert "TRITON_INTERPRET" not in variables
    assert variables["TRITON_CACHE_DIR"] == str(tmp_path)
