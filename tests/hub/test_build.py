"""The hub's copy: complete, loaded by ``kernels``, and right where flashlayer is not installed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import Metadata
from kernels._rust import Build, Digest, DigestAlgorithm

import flashlayer
from hub import kernel
from hub.build import PACKAGE, build, with_relative_imports

# Offline, and as if flashlayer were not installed: None in sys.modules makes an import fail.
WITHOUT_FLASHLAYER = "import sys; sys.modules['flashlayer'] = None\n"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "flashlayer"
    build(folder)
    return folder


def run(program: str, *arguments: object, **variables: str) -> list[str]:
    """The lines that ``program`` prints."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "-P", "-W", "error::ImportWarning", "-c", program]
    result = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_every_module_is_there_and_none_reaches_for_flashlayer(repository: Path) -> None:
    sources = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    for root in (repository / "torch-ext/flashlayer", *(repository / "build").iterdir()):
        assert {path.relative_to(root) for path in root.rglob("*.py")} == sources
        for path in root.rglob("*.py"):
            source = path.read_text()
            assert "torch.ops.flashlayer" not in source, path
            assert "flashlayer::" not in source, path
            for node in ast.walk(ast.parse(source)):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [str(node.module)]
                assert not any(name.split(".")[0] == "flashlayer" for name in names), path


def test_everything_public_is_exported() -> None:
    assert {*flashlayer.__all__, "flash_attn_func", "flash_attn_varlen_func"} < {*kernel.__all__}
    assert all(hasattr(kernel, name) for name in kernel.__all__)


def test_the_description_is_what_kernels_reads(repository: Path) -> None:
    """Its own parsers: of ``build.toml``, of the metadata, and of the files' digests."""
    backends = {str(backend) for backend in Build.open(repository).general.backends}
    variants = list((repository / "build").iterdir())
    assert {f"torch-{backend}" for backend in backends} == {path.name for path in variants}
    for path in variants:
        metadata = Metadata.read_from_file(path / "metadata.json")
        assert metadata.id.isidentifier()
        assert metadata.python_depends == ["einops"]
        assert f"torch-{metadata.backend.backend_type}" == path.name
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, path))


def test_it_runs_without_flashlayer_and_triton(repository: Path) -> None:
    program = WITHOUT_FLASHLAYER + (
        "sys.modules['triton'] = None\n"
        """
from pathlib import Path
import kernels, torch
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
assert all(getattr(kernel, name) is not None for name in kernel.__all__)
q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 9, 4, 16, dtype=torch.double).unbind())
standard = kernel.flash_attention(
    *(x.transpose(1, 2) for x in (q, k, v)), causal=True, backend="standard"
).transpose(1, 2)
edges = torch.arange(3, dtype=torch.int32) * 9
packed = [x.flatten(0, 1) for x in (q, k, v)]
dense = kernel.flash_attn_func(q, k, v, causal=True)
varlen = kernel.flash_attn_varlen_func(*packed, edges, edges, 9, 9, causal=True)
torch.testing.assert_close(dense, standard)
torch.testing.assert_close(varlen, standard.flatten(0, 1))
grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (dense, varlen, standard)]
torch.testing.assert_close(grads[0], grads[2])
torch.testing.assert_close(grads[1], grads[2])
layer = kernel.FlashAttention(32, num_heads=4, causal=True, rotary_base=10000.0)
layer(torch.randn(2, 9, 32)).sum().backward()
kernel.integrations.flash_attn.install()
import flash_attn
assert flash_attn.flash_attn_func is kernel.flash_attn_func
print(kernel.__name__)
"""
    )
    (name,) = run(program, repository)
    assert name == Metadata.read_from_file(repository / "build/torch-cpu/metadata.json").id


def test_two_versions_and_an_installed_flashlayer_do_not_meet(
    repository: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "flashlayer"
    shutil.copytree(PACKAGE, changed, ignore=shutil.ignore_patterns("__pycache__"))
    with (changed / "spec.py").open("a") as spec:
        spec.write("VERSION = 2\n")
    build(tmp_path / "hub", package=changed)
    program = """
import sys
from pathlib import Path
import flashlayer, kernels, torch
old, new = (kernels.get_local_kernel(Path(path)) for path in sys.argv[1:])
q, k, v = torch.randn(3, 1, 2, 17, 16)
assert not hasattr(sys.modules[f"{old.__name__}.spec"], "VERSION")
assert sys.modules[f"{new.__name__}.spec"].VERSION == 2
import flashlayer.integrations.transformers
# Dynamo has one table of substitutes: each registration after the first finds its own there.
assert {x.integrations.transformers.register() for x in (flashlayer, old, new)} == {"FlashLayer"}
for package in (flashlayer, old, new):
    namespace = package.__name__
    seen = []
    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph
    compiled = torch.compile(
        lambda q, k, v: package.flash_attention(q, k, v, causal=True), backend=look, fullgraph=True
    )
    expected = package.flash_attention(q, k, v, causal=True, backend="tiled")
    torch.testing.assert_close(compiled(q, k, v), expected)
    print(*{op.split(".")[0] for op in seen if op.endswith(".forward.default")}, namespace)
    triton = package.flash_attention(q, k, v, causal=True, backend="triton")
    torch.testing.assert_close(triton, expected)
"""
    lines = run(program, repository, tmp_path / "hub", TRITON_INTERPRET="1")
    pairs = [line.split() for line in lines]
    assert all(op == name for op, name in pairs)
    assert len({name for _, name in pairs}) == 3


def test_models_of_transformers_load_it_by_name(repository: Path) -> None:
    """As ``org/repo``, as ``org/repo:function``, and as FlashLayer: equal to eager."""
    program = WITHOUT_FLASHLAYER + (
        """
import importlib.metadata, json
# transformers 5.23 asks for kernels 0.18.2; the tested version has all that it calls.
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.18.2" if name == "kernels" else version(name)
import kernels, torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig
from transformers import modeling_flash_attention_utils as host
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
sizes |= dict(head_dim=8, num_hidden_layers=2, vocab_size=64, pad_token_id=0)
REPOSITORY = "flashlayer/flashlayer"
NAMES = (REPOSITORY, f"{REPOSITORY}:flash_attn_varlen_func", None)
ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
padding = torch.ones_like(ids)
padding[0, :5] = 0
for config in (LlamaConfig(**sizes), Gemma2Config(**sizes, sliding_window=4)):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    def results():
        found = []
        for mask in (None, padding):
            logits = model(input_ids=ids, attention_mask=mask).logits
            if mask is not None:
                logits = logits * mask[..., None]
            grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            found += [logits.detach(), *grads]
        options = dict(max_new_tokens=4, do_sample=False)
        return found, model.generate(ids, attention_mask=padding, **options).tolist()
    expected, expected_ids = results()
    for name in NAMES:
        if name is None:
            (loaded,) = kernels.get_loaded_kernels()
            name = loaded.module.register()
        else:
            host._flash_fn = None
        model.set_attn_implementation(name, allow_all_kernels=True)
        actual, actual_ids = results()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert actual_ids == expected_ids
        function = ALL_ATTENTION_FUNCTIONS[name] if name == "FlashLayer" else host._flash_fn
        print(json.dumps([model.config._attn_implementation, function.__module__]))
"""
    )
    lines = run(program, LOCAL_KERNELS=f"flashlayer/flashlayer={repository}")
    repo = "flashlayer/flashlayer"
    names, homes = zip(*map(json.loads, lines), strict=True)
    assert names == (repo, f"{repo}:flash_attn_varlen_func", "FlashLayer") * 2
    assert all(home.startswith("_flashlayer_cpu_") for home in homes)


def test_a_folder_of_something_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="must be empty or hold an earlier build"):
        build(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_import_without_relative_counterpart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a/b\.py:2: import from flashlayer"):
        with_relative_imports("import torch\nimport flashlayer.spec\n", Path("a/b.py"))
