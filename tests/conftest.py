"""What every test runs under."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from train.measure import machine

# Without a GPU the kernels run in Triton's interpreter, asked for before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from tests.interpreter import patch_language_once_per_launch

        patch_language_once_per_launch()

# Each of pytest-xdist's workers has a core of its own; more threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Some parameters are random tensors, drawn as the tests are collected: the same in every worker,
# whichever files are collected.
torch.manual_seed(0)

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write counts, device and versions here, as JSON")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if path := config.getoption("record"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        outcomes = ("passed", "failed", "error", "skipped")
        record = {
            **machine(device),
            "triton": version("triton") if find_spec("triton") else None,
            "selection": config.invocation_params.args,
            "tests": {name: len(terminalreporter.getreports(name)) for name in outcomes},
            "examples": dict(sorted(_examples.items())),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
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
            if item.get_closest_marker(marker):
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
