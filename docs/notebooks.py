"""Runs the chapter's notebooks and finds committed outputs that are stale.

``python docs/notebooks.py`` runs all of them and writes the outputs into the files;
``python docs/notebooks.py 1 3`` those whose names start with 1 or 3.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
from jupyter_client.manager import AsyncKernelManager
from matplotlib.image import imread
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "chapter").glob("*.ipynb"))

# Share of a picture's pixels that may differ: on another CPU the last bit of a number can shift the
# antialiased edge of a line. A changed word or curve differs in ten times as many.
PIXELS = 1e-4
SHADE = 0.2  # a pixel differs from this difference of a channel on, of a range of 1


def execute(path: Path) -> NotebookNode:
    """Run all cells of a notebook in order, in a new kernel.

    Raises:
        CellExecutionError: a cell raised; the message has its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    return asyncio.run(_execute(notebook, path.parent))


async def _execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    with tempfile.TemporaryDirectory() as scratch:
        # Unix sockets: a free TCP port could be taken before the kernel binds it.
        manager = AsyncKernelManager(
            kernel_name="python3",
            transport="ipc",
            connection_file=str(Path(scratch) / "kernel.json"),
        )
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=300,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        # Import this checkout, and ignore the user's IPython profile.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "IPYTHONDIR": scratch}
        await client.async_execute(env=environment, cleanup_kc=True)
    return clean(notebook)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Remove metadata that depends on the editor or the run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        for output in cell.get("outputs", []):
            output.pop("metadata", None)
            if output.output_type in ("execute_result", "display_data"):
                output.metadata = {}
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook in the format that is committed."""
    nbformat.write(notebook, path)


def stale_outputs(committed: NotebookNode, executed: NotebookNode) -> list[str]:
    """Differences between the committed outputs and those of a run, one line each."""
    stale = []
    for number, (before, after) in enumerate(zip(committed.cells, executed.cells, strict=True)):
        if before.cell_type != "code":
            continue
        where = f"cell {number} ({before.source.strip().splitlines()[0]})"
        if before.execution_count != after.execution_count:
            stale.append(f"{where}: was not run in this order")
        if kinds(before) != kinds(after):
            stale.append(f"{where}: has other outputs than before")
            continue
        for old, new in zip(before.outputs, after.outputs, strict=True):
            stale += [f"{where}: {difference}" for difference in _differences(old, new)]
    return stale


def kinds(cell: NotebookNode) -> list[tuple[str, ...]]:
    """Type, stream name and MIME types of each of a cell's outputs."""
    return [
        (output.output_type, output.get("name", ""), *sorted(output.get("data", {})))
        for output in cell.outputs
    ]


def _differences(old: NotebookNode, new: NotebookNode) -> list[str]:
    if "data" not in old:
        return [] if old.text == new.text else [f"says\n{new.text}and not\n{old.text}"]
    found = []
    for mime, content in old.data.items():
        if mime == "image/png":
            if not same_picture(content, new.data[mime]):
                found.append("draws another picture")
        elif content != new.data[mime]:
            found.append(f"gives\n{new.data[mime]}\nand not\n{content}")
    return found


def same_picture(old: str, new: str) -> bool:
    """Whether two PNGs in base 64 differ in few enough pixels."""
    a, b = (imread(io.BytesIO(base64.b64decode(data))) for data in (old, new))
    return a.shape == b.shape and bool((np.abs(a - b).max(-1) > SHADE).mean() <= PIXELS)


if __name__ == "__main__":
    for notebook_path in NOTEBOOKS:
        if len(sys.argv) == 1 or notebook_path.name.startswith(tuple(sys.argv[1:])):
            print(notebook_path.relative_to(ROOT))
            write(execute(notebook_path), notebook_path)
