"""What every test runs under."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, asked for before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Each of pytest-xdist's workers has a core of its own; more threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

_examples: Counter[str] = Counter()


def count_example(backend: str, *, refused: bool) -> None:
    """Count one drawn problem; the sums are printed at the end of the run."""
    _examples[f"{backend}: {'refused with a reason' if refused else 'held against fp64'}"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its counts to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["examples"] = dict(_examples)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    _examples.update(getattr(node, "workeroutput", {}).get("examples", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _examples:
        terminalreporter.section("property suite, examples")
        for what, count in sorted(_examples.items()):
            terminalreporter.write_line(f"{count:6d}  {what}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    if "slow" not in config.getoption("markexpr"):
        skips["slow"] = pytest.mark.skip(reason="takes minutes: pytest -m slow")
    for item in items:
        for marker, skip in skips.items():
            if marker in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN, and raise where an operation is not deterministic."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
