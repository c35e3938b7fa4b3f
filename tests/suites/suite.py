"""A suite, and the pytest plugin that runs it: what is left out, what can't apply, the counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.suites.devices import CudaIsCpu
from tests.suites.source import Source

POOL = 50  # cases that further parameters multiply, for each that is kept in the end


def never(parameters: dict[str, Any]) -> bool:
    """No case is too large."""
    return False


def nothing(module: ModuleType) -> None:
    """The suite needs no change."""


@dataclass(frozen=True)
class Suite:
    """What there is to know about a published suite."""

    source: Source
    files: tuple[str, ...]  # its test files, from its folder

    # Puts flashlayer in the place of the original, before a file of the suite is imported.
    replace: Callable[[], None]

    # Patterns of test ids, as pytest shows them -> why the test can't apply to flashlayer. Nothing
    # stands here because it fails.
    not_applicable: Mapping[str, str] = field(default_factory=dict)

    # Whether a case with these parameters, or with more of them, is too large for a CPU.
    too_large: Callable[[dict[str, Any]], bool] = never

    # Changes what an imported file of the suite knows of the original's inside.
    adapt: Callable[[ModuleType], None] = nothing


class Plugin:
    """Runs a suite, for one process of pytest."""

    def __init__(self, suite: Suite, cases: int) -> None:
        self.suite = suite
        self.cases = cases
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.outcomes: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.left_out = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> Iterator[None]:
        """Thin out a function's cases while its parameters multiply.

        Of those that are not too large for this device it keeps the ``cases`` whose ids have the
        lowest sha256: always the same ones, whatever the step of a parameter is. Products of some
        100,000 cases, as there are, would take minutes and gigabytes before the first test runs.
        """
        parametrize = metafunc.parametrize
        published = 0

        def thinned(*args: Any, **kwargs: Any) -> None:
            nonlocal published
            before = len(metafunc._calls) or 1
            parametrize(*args, **kwargs)
            published = (published or 1) * len(metafunc._calls) // before
            metafunc._calls[:] = self._lowest(metafunc._calls, POOL * self.cases)

        metafunc.parametrize = thinned  # type: ignore[method-assign]
        yield
        metafunc._calls[:] = self._lowest(metafunc._calls, self.cases)
        self.left_out += published - len(metafunc._calls)
        if any(self._too_large(call.params) for call in metafunc._calls):
            skip = pytest.mark.skip(reason="every case is too large for a CPU")
            metafunc.definition.own_markers.append(skip)

    def _lowest(self, calls: list[Any], count: int) -> list[Any]:
        """At most ``count`` calls, in their order; one at least, as pytest takes none for all."""
        small = [call for call in calls if not self._too_large(call.params)] or calls[:1]
        if not 0 < count < len(small):
            return small
        by_hash = sorted(small, key=lambda call: hashlib.sha256(call.id.encode()).digest())
        chosen = {id(call) for call in by_hash[:count]}
        return [call for call in small if id(call) in chosen]

    def _too_large(self, parameters: dict[str, Any]) -> bool:
        return self.device == "cpu" and self.suite.too_large(parameters)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for module in {item.module for item in items if isinstance(item, pytest.Function)}:
            self.suite.adapt(module)
        for item in items:
            for pattern, reason in self.suite.not_applicable.items():
                if fnmatchcase(item.nodeid, pattern):
                    item.add_marker(pytest.mark.skip(reason=f"not applicable: {reason}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        with CudaIsCpu() if self.device == "cpu" else nullcontext():
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.failed or report.when == "call":
            self.outcomes[report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        terminalreporter.section(f"{self.suite.source.folder}, {self.device}")
        write(f"{self.outcomes['passed']:7d}  passed")
        for reason, count in sorted(self.skipped.items()):
            write(f"{count:7d}  skipped: {reason}")
        write(f"{self.outcomes['failed']:7d}  failed")
        write(
            f"{self.left_out:7d}  left out: beyond {self.cases} a function, or too large for a CPU"
        )
