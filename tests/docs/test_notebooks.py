"""The chapter's notebooks run, and their committed outputs are those of a run."""

import base64
import copy
import io
from pathlib import Path

import nbformat
import pytest
from matplotlib.figure import Figure
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from docs.notebooks import NOTEBOOKS, clean, execute, same_picture, stale_outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_fresh(path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    assert committed == clean(copy.deepcopy(committed)), "write it with `make notebooks`"
    assert stale_outputs(committed, execute(path)) == [], "renew it with `make notebooks`"


def notebook(*sources: str) -> NotebookNode:
    return new_notebook(cells=[new_code_cell(source) for source in sources])


def test_stale_outputs_are_found(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    nbformat.write(clean(notebook("print(6 * 7)", "6 * 9", "answer = 54")), path)
    executed = execute(path)
    assert stale_outputs(executed, executed) == []

    said, gave, silent = (copy.deepcopy(executed) for _ in range(3))
    said.cells[0].outputs[0].text = "41\n"
    assert "cell 0 (print(6 * 7)): says\n42" in stale_outputs(said, executed)[0]
    gave.cells[1].outputs[0].data["text/plain"] = "42"
    assert "cell 1 (6 * 9): gives\n54" in stale_outputs(gave, executed)[0]
    silent.cells[2].outputs.append(new_output("stream", name="stderr", text="a warning"))
    assert "has other outputs" in stale_outputs(silent, executed)[0]
    never_run = nbformat.read(path, as_version=4)
    assert len(stale_outputs(never_run, executed)) == 5  # three counts, two outputs


def test_an_exception_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    nbformat.write(clean(notebook("1 / 0")), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(path)


def picture(slope: float, label: str = "error") -> str:
    figure = Figure(figsize=(7, 3.5), dpi=100)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, slope])
    axes.set_ylim(0, 1)
    axes.set_xlabel(label)
    figure.savefig(data := io.BytesIO())
    return base64.b64encode(data.getvalue()).decode()


def test_pictures_are_compared_by_what_they_show() -> None:
    drawn = picture(0.5)
    assert same_picture(drawn, picture(0.5 * (1 + 1e-4)))  # as another CPU might round
    assert not same_picture(drawn, picture(0.52))
    assert not same_picture(drawn, picture(0.5, label="errors"))
