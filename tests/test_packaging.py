"""The wheel: flashlayer alone, and it works beside torch with nothing else installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_flashlayer_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flashlayer"}
    assert "flashlayer/py.typed" in names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "flashlayer").rglob("*.py")}
    assert modules <= set(names)


def test_wheel_runs_beside_torch_alone(wheel: Path, tmp_path: Path) -> None:
    """Everything but torch and what torch itself needs is hidden from the import system."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = f"""
import sys
hidden = {{"triton", "einops", "lightning", "transformers", "datasets", "matplotlib"}}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
sys.path.insert(0, {str(tmp_path)!r})
import torch, flashlayer
assert flashlayer.__file__.startswith({str(tmp_path)!r})
q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
flashlayer.flash_attention(q, k, v, causal=True).sum().backward()
reasons = flashlayer.available_backends(q, k, v)
print("not installed" in reasons["triton"], reasons["tiled"])
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "None"]
