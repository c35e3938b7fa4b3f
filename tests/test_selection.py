"""``auto`` on a CPU against the measurement that its rule was read off."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.cases import Case, draw
from flashlayer import backends, functional

RESULTS = Path(__file__).parent.parent / "benchmarks/results/cpu-2-cores/backends/attention.json"
# Two runs of one backend differ by this much on a machine that does other things as well.
NOISE = 1.15
CELLS: list[dict[str, Any]] = json.loads(RESULTS.read_text())["cells"]


def name(cell: dict[str, Any]) -> str:
    case = Case(**cell["case"])
    return f"{case.group}, {case.name}, {case.dtype}"


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_auto_is_the_fastest_that_was_measured(
    cell: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward together, where there is a backward."""
    phase = "both" if cell["case"]["backward"] else "forward"
    seconds = {
        backend: cell["peers"][backend][phase]
        # "standard" stores the scores, however fast it is; of one query they are no more than keys.
        for backend in ("aten", "tiled", *(["standard"] if cell["case"]["seqlen"] == 1 else []))
        if phase in cell["peers"][backend]
    }
    case = Case(**cell["case"])
    inputs = draw(case, torch.device("cpu"))
    runner = peers.prepare(peers.OURS, case, inputs, memory_limit=2**30)
    chosen = []
    select = backends.select
    monkeypatch.setattr(backends, "select", lambda *x: (chosen.append(select(*x)), chosen[0])[1])
    monkeypatch.setattr(functional, "attend", lambda backend, _, problem: (problem.query, None))
    runner.forward()
    assert seconds[chosen[0].name] <= NOISE * min(seconds.values())
