"""Builds the kernel repository for the Hugging Face hub: ``python -m hub.build build/hub``.

The result has the layout of a pure-Python ("noarch") kernel: ``build.toml`` and the package under
``torch-ext/flashlayer``, from which ``kernel-builder`` builds, and under ``build/torch-<backend>``
what it would build, so that ``kernels.get_local_kernel`` loads the folder as it is. The package is
``flashlayer/`` with ``hub/kernel.py`` as its ``__init__``.

``kernels`` loads a package under a name that says which build it is, so that two versions can be
loaded beside each other and beside an installed flashlayer. Absolute imports would leave the
package, so they become relative ones; the custom ops take the name as their namespace.

The format: https://huggingface.co/docs/kernels, "Kernel requirements" and "Writing kernels".
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
HUB = ROOT / "hub"
PACKAGE = ROOT / "flashlayer"


def build(folder: Path, package: Path = PACKAGE) -> list[Path]:
    """Write the repository to ``folder``, which is emptied first.

    Args:
        folder: made if it does not exist.
        package: the folder of the sources.

    Returns:
        The folder of each backend's build.

    Raises:
        ValueError: ``folder`` holds something that is no such repository, or a source imports the
            package in a form that has no relative counterpart.
    """
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "build.toml").exists():
            raise ValueError(f"folder must be empty or hold an earlier build, got {folder}")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HUB / name, folder)
    shutil.copy(ROOT / "LICENSE", folder)
    general = tomllib.loads((HUB / "build.toml").read_text())["general"]
    sources = {path.relative_to(package): path for path in sorted(package.rglob("*.py"))}
    sources[Path("__init__.py")] = HUB / "kernel.py"
    for name, path in sources.items():
        target = folder / "torch-ext" / general["name"] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(with_relative_imports(path.read_text(), name))
    return [_build_for(backend, folder, general) for backend in general["backends"]]


def with_relative_imports(source: str, path: Path) -> str:
    """``source``, the file at ``path`` in the package, with ``from flashlayer...`` relative."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == PACKAGE.name for alias in node.names):
                raise ValueError(f"{path}:{node.lineno}: import from flashlayer, not flashlayer")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            top, _, inner = node.module.partition(".")
            if top == PACKAGE.name:
                absolute, relative = f"from {node.module} ", f"from {'.' * len(path.parts)}{inner} "
                line = lines[node.lineno - 1]
                lines[node.lineno - 1] = line.replace(absolute, relative, 1)
    return "".join(lines)


def _build_for(backend: str, folder: Path, general: dict) -> Path:
    target = folder / "build" / f"torch-{backend}"
    shutil.copytree(folder / "torch-ext" / general["name"], target)
    files = {
        path.relative_to(target).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(target.rglob("*.py"))
    }
    content = hashlib.sha256(b"".join(name.encode() + files[name] for name in files)).hexdigest()
    metadata = {
        "name": general["name"],
        "id": f"_{general['name']}_{backend}_{content[:10]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": general["python-depends"],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in files.items()},
        },
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the repository is written")
    for built in build(parser.parse_args().folder):
        print(built)
