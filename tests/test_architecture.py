"""The house plan, read off the imports."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flashlayer"
STANDARD_LIBRARY = sys.stdlib_module_names | {"__future__"}

# Which rooms a room may look into, and which third parties it may use.
ALLOWED = {
    "kernels": {"kernels", "triton", "math", "dataclasses", "typing"},
    "backends/triton": {"backends/triton", "kernels", "spec", "philox", "torch", "triton"},
    "backends/aten": {"backends/aten", "spec", "online_softmax", "torch"},
    "backends/ops": {"backends/aten", "backends/tiled", "backends/triton", "spec", "torch"},
    "backends/*": {"spec", "online_softmax", "philox", "torch"},
    "backends/__init__": {
        "backends/aten",
        "backends/ops",
        "backends/standard",
        "backends/tiled",
        "backends/triton",
        "spec",
        "torch",
    },
    "spec": {"torch"},
    "online_softmax": {"torch"},
    "philox": {"torch"},
    "autograd": {"spec", "torch"},
    "functional": {"autograd", "backends", "philox", "spec", "torch"},
    "tuning": {"backends/triton", "functional", "kernels", "spec", "torch", "triton"},
    "distributed": {"functional", "online_softmax", "spec", "torch"},
    "heads": {"torch"},
    "cache": {"functional", "online_softmax", "torch", "einops"},
    "tracing": {"torch"},
    "modules": {"cache", "distributed", "functional", "heads", "tracing", "torch", "einops"},
    "multihead": {"functional", "tracing", "weights", "torch"},
    "weights": {"functional", "spec", "torch"},
    "integrations/*": {
        "functional",
        "integrations",
        "multihead",
        "online_softmax",
        "tracing",
        "torch",
    },
    "integrations/transformers": {"functional", "integrations", "torch", "transformers"},
}

# Who outside the package looks into its rooms, and into which.
MAY_OPEN = {
    # compiles the kernels as the backend launches them
    "codegen.py": ("flashlayer.kernels", "flashlayer.backends.triton", "flashlayer.spec"),
    # read the kernels' source and watch them run
    "5_kernel.ipynb": ("flashlayer.kernels",),
    "6_backward.ipynb": ("flashlayer.kernels",),
}


# What flashlayer.online_softmax and flashlayer.distributed offer to a user.
ONLINE_SOFTMAX = ("SoftmaxState", "init_state", "update", "state_of", "merge", "finalize", "lse")
DISTRIBUTED = {
    "ring_attention",
    "ulysses_attention",
    "shard_sequence",
    "unshard_sequence",
    "position_ids",
    "shard_lengths",
}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("").as_posix()
    for folder in ("kernels", "backends/aten", "backends/triton", "integrations/transformers"):
        if relative.startswith(f"{folder}/"):
            return folder
    for house in ("backends", "integrations"):
        if relative.startswith(f"{house}/") and relative not in ALLOWED:
            return f"{house}/*"
    return relative


def imports(path: Path) -> set[str]:
    """Rooms of flashlayer and top-level third parties that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        top, *rest = name.split(".")
        if top == "flashlayer":
            depth = 2 if rest[:1] == ["backends"] else 1  # each backend is a room of its own
            found.add("/".join(rest[:depth]) or "flashlayer")
        else:
            found.add(top)
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_arrows(path: Path) -> None:
    allowed = ALLOWED[room(path)]
    if room(path) != "kernels":
        allowed = allowed | STANDARD_LIBRARY
    assert imports(path) <= allowed


def python_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """The source of every Python file and notebook."""
    for path in folder.rglob("*.py"):
        yield path, path.read_text()
    for path in folder.rglob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        yield path, "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@pytest.mark.parametrize("folder", ["train", "benchmarks", "docs"])
def test_outside_the_package_only_public_names_are_used(folder: str) -> None:
    import flashlayer

    public = {f"flashlayer.{name}" for name in (*flashlayer.__all__, "__version__")}
    public |= {"flashlayer", "flashlayer.online_softmax"}
    public |= {f"flashlayer.online_softmax.{name}" for name in ONLINE_SOFTMAX}
    public |= {f"flashlayer.distributed.{name}" for name in DISTRIBUTED}
    for path, source in python_in(ROOT / folder):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                used = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used = {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                continue
            used = {name for name in used if name.split(".")[0] == "flashlayer"}
            inner = MAY_OPEN.get(path.name, ())
            assert {name for name in used if not name.startswith(inner)} <= public, path


def test_importing_needs_torch_alone() -> None:
    """Whatever else is installed stays unloaded until it is used."""
    program = (
        "import sys, torch; before = set(sys.modules); import flashlayer; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names) - {'torch', 'flashlayer'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == []


def test_every_public_name_is_there() -> None:
    import flashlayer

    for name in flashlayer.__all__:
        assert getattr(flashlayer, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'flash'"):
        flashlayer.flash  # noqa: B018
