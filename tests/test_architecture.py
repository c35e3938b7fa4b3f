"""The house plan, read off the imports."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flashlayer"
STANDARD_LIBRARY = sys.stdlib_module_names | {"__future__"}

# Which rooms a room may look into, and which third parties it may use.
ALLOWED = {
    "kernels": {"kernels", "triton", "math", "dataclasses", "typing"},
    "backends/triton": {
        "backends/split_keys",
        "backends/triton",
        "kernels",
        "masks",
        "spec",
        "philox",
        "torch",
        "triton",
    },
    "backends/aten": {"backends/aten", "masks", "spec", "online_softmax", "torch"},
    "_ops": {"torch"},
    "backends/ops": {
        "_ops",
        "backends/aten",
        "backends/sharding",
        "backends/tiled",
        "backends/triton",
        "spec",
        "torch",
    },
    "backends/sharding": {"_ops", "spec", "torch"},
    "backends/*": {"masks", "spec", "online_softmax", "philox", "torch"},
    "backends/__init__": {
        "backends/aten",
        "backends/ops",
        "backends/standard",
        "backends/tiled",
        "backends/triton",
        "spec",
        "torch",
    },
    "masks": {"masks", "torch"},
    "spec": {"masks", "torch"},
    "online_softmax": {"torch"},
    "philox": {"torch"},
    "auxiliary": {"torch"},
    "problem": {"auxiliary", "masks", "philox", "spec", "torch"},
    "plans": {"spec", "torch"},
    "transforms": {"spec", "torch"},
    "autograd": {"spec", "transforms", "torch"},
    "functional": {
        "autograd",
        "auxiliary",
        "backends",
        "masks",
        "philox",
        "plans",
        "problem",
        "spec",
        "torch",
    },
    "testing": {"testing", "functional", "torch"},
    "tuning": {"backends/triton", "kernels", "problem", "spec", "torch", "triton"},
    "distributed": {
        "auxiliary",
        "backends",
        "distributed",
        "functional",
        "masks",
        "online_softmax",
        "problem",
        "spec",
        "torch",
    },
    "modules": {
        "backends",
        "distributed",
        "functional",
        "masks",
        "modules",
        "spec",
        "torch",
        "einops",
    },
    "integrations": {
        "_ops",
        "backends",
        "functional",
        "integrations",
        "masks",
        "modules",
        "problem",
        "spec",
        "torch",
    },
    "integrations/transformers": {
        "functional",
        "integrations",
        "masks",
        "problem",
        "spec",
        "torch",
        "transformers",
    },
}

# Which of the repository's packages a package may import. Tests may import all of them.
PACKAGES: dict[str, set[str]] = {
    "flashlayer": set(),
    "train": {"flashlayer"},
    "benchmarks": {"flashlayer", "train"},
    "docs": {"flashlayer"},
    "hub": {"flashlayer"},
}

# Of train's rooms: how runs are run knows nothing of the proof or the command line. In front is
# what both rooms stand on; `config` builds a run, `cli` is the door.
TRAIN = {
    "running": {"train", "lit", "measure", "model", "running"},
    "proof": {"train", "config", "lit", "measure", "model", "proof", "running"},
    "measure": set(),
    "model": {"train", "running"},
    "lit": {"model", "running"},
    "data": {"train"},
    "config": {"train", "data", "lit", "model", "running"},
}

# Who outside the package looks into its rooms, and into which.
MAY_OPEN = {
    # compiles the kernels as the backend launches them
    "codegen.py": ("flashlayer.kernels", "flashlayer.backends.triton", "flashlayer.spec"),
    # compiles what the stages of a GPU run will launch
    "gpu_compile.py": ("flashlayer.backends", "flashlayer.problem"),
    "codegen_specialized.py": ("flashlayer.kernels", "flashlayer.backends.triton"),
    # models the order in which the backend starts programs
    "schedule.py": ("flashlayer.kernels", "flashlayer.backends.triton", "flashlayer.spec"),
    # read the kernels' source and watch them run
    "5_kernel.ipynb": ("flashlayer.kernels",),
    "6_backward.ipynb": ("flashlayer.kernels",),
}


# What flashlayer.online_softmax and flashlayer.distributed offer to a user.
ONLINE_SOFTMAX = ("SoftmaxState", "init_state", "update", "state_of", "merge", "finalize", "lse")
DISTRIBUTED = {
    "Placement",
    "ring_attention",
    "ulysses_attention",
    "shard_sequence",
    "unshard_sequence",
    "position_ids",
    "shard_lengths",
}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("").as_posix()
    rooms = ("kernels", "masks", "backends/aten", "backends/triton", "modules", "distributed")
    for folder in (*rooms, "integrations/transformers", "integrations", "testing"):
        if relative.startswith(f"{folder}/"):
            return folder
    if relative.startswith("backends/") and relative not in ALLOWED:
        return "backends/*"
    return relative


def imported(source: str) -> set[str]:
    """What a source imports, anywhere in it, by its full name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(path: Path) -> set[str]:
    """Rooms of flashlayer and top-level third parties that a file imports, anywhere in it."""
    found = set()
    for name in imported(path.read_text()):
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
    public |= {f"flashlayer.masks.{name}" for name in flashlayer.masks.__all__}
    public |= {f"flashlayer.testing.{name}" for name in flashlayer.testing.__all__}
    for path, source in python_in(ROOT / folder):
        used = {name for name in imported(source) if name.split(".")[0] == "flashlayer"}
        inner = MAY_OPEN.get(path.name, ())
        assert {name for name in used if not name.startswith(inner)} <= public, path


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_no_tests_and_form_no_loop(package: str) -> None:
    repository = {*PACKAGES, "tests"}
    for path, source in python_in(ROOT / package):
        found = {name.split(".")[0] for name in imported(source)} & repository
        assert found <= PACKAGES[package] | {package}, path


@pytest.mark.parametrize("room", TRAIN)
def test_rooms_of_the_training_stack(room: str) -> None:
    folder = ROOT / "train" / room
    for path in folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        names = [name for name in imported(path.read_text()) if name.split(".")[0] == "train"]
        inner = {name.split(".")[1] for name in names}
        files = {path.stem for path in (ROOT / "train").iterdir()}
        assert {name if name in files else "train" for name in inner} <= TRAIN[room], path


def test_modules_outside_the_package_import_each_other_in_no_loop() -> None:
    arrows = {}
    for package in ("train", "benchmarks"):
        for path, source in python_in(ROOT / package):
            arrows[".".join(path.relative_to(ROOT).with_suffix("").parts)] = imported(source)
    graph = {
        module: {
            other
            for name in names
            for other in (name, name.rpartition(".")[0])
            if other in arrows and other != module
        }
        for module, names in arrows.items()
    }
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


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
