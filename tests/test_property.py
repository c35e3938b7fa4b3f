"""Random problems of every option, dtype and layout, compared with fp64.

`make test` runs a short search from a fixed seed, ``pytest -m slow tests/test_property.py`` a long
one. The number of examples is printed at the end of the run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from flashlayer.testing import assert_attention_close
from tests.conftest import count_example
from tests.strategies import Drawn, packed_problems, problems

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EXAMPLES = {"tiled": 150, "aten": 150, "triton": 30}
SLOW_EXAMPLES = 2000


def check(backend: str, problem: Drawn) -> None:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    q, k, v = (x.to(device) for x in problem[:3])
    options = {
        name: option.to(device) if hasattr(option, "to") else option
        for name, option in problem.options.items()
    }
    torch.manual_seed(0)
    refused = False
    try:
        assert_attention_close(backend, q, k, v, with_noise=True, **options)
    except ValueError as error:
        refused = "can't compute this call" in str(error)
        if not refused:
            raise
    count_example(backend, refused=refused)


def search(backend: str, examples: int, strategy: SearchStrategy[Drawn]) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(problem=strategy)
    def run(problem: Drawn) -> None:
        check(backend, problem)

    run()


def dense(backend: str, **drawn: Any) -> SearchStrategy[Drawn]:
    return problems(dtypes=FLOATS, plain=backend == "aten", **drawn)


@pytest.mark.parametrize("backend", EXAMPLES)
def test_any_problem(backend: str) -> None:
    search(backend, EXAMPLES[backend], dense(backend))


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_any_packed_problem(backend: str) -> None:
    search(backend, EXAMPLES[backend] // 2, packed_problems(dtypes=FLOATS))


@pytest.mark.slow
@pytest.mark.parametrize("backend", EXAMPLES)
def test_any_interval_mask_at_length(backend: str) -> None:
    examples = 500 if backend == "triton" else SLOW_EXAMPLES
    search(backend, examples, dense(backend, mask_kinds=("intervals",)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", EXAMPLES)
def test_any_problem_at_length(backend: str) -> None:
    search(backend, SLOW_EXAMPLES, dense(backend))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_any_packed_problem_at_length(backend: str) -> None:
    search(backend, SLOW_EXAMPLES, packed_problems(dtypes=FLOATS))


@pytest.mark.gpu
def test_any_problem_at_real_sizes() -> None:
    strategy = problems(
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        lengths=(1, 127, 512, 1000, 2049),
        head_dims=(40, 64, 96, 128, 256),
    )
    search("triton", 500, strategy)
