"""A small text, a cache of its own, and a working directory that is thrown away."""

import inspect
import signal
import textwrap
from pathlib import Path

import datasets
import pytest

TINY = """
    name: tiny
    model:
      gpt: {context: 32, n_layer: 2, n_head: 2, n_embd: 32}
      learning_rate: 3.0e-3
      warmup_steps: 5
    data: {batch_size: 4}
    trainer: {accelerator: cpu, max_steps: 12, val_check_interval: 6, limit_val_batches: 2}
"""
PARITY = """
    parity:
      rule: {min_fall: 0.05}
      speed_rounds: 1
      layer: {lengths: [16, 32], heads: 1, head_dim: 8, rounds: 1}
"""


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a test tokenises is not left in the user's cache, and what is there is not used."""
    cache = tmp_path_factory.mktemp("datasets")
    datasets.config.HF_DATASETS_CACHE = cache
    return cache


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell without job control starts what it puts in the background with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTF-8 file of some 40,000 bytes of English and code."""
    path = tmp_path_factory.mktemp("text") / "some text.txt"
    path.write_text(inspect.getsource(textwrap) + inspect.getsource(inspect)[:20_000] + "naïve ✓\n")
    return path


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fit_arguments(working_directory: Path, text: Path) -> list[str]:
    """``fit`` with a tiny GPT on the small text."""
    (working_directory / "fit.yaml").write_text(textwrap.dedent(TINY))
    return ["fit", "--config", "fit.yaml", "--data.corpus", f"files:{text}"]


@pytest.fixture
def parity_arguments(working_directory: Path, text: Path) -> list[str]:
    """``parity`` with three arms of the tiny GPT."""
    (working_directory / "parity.yaml").write_text(textwrap.dedent(TINY + PARITY))
    return ["parity", "--config", "parity.yaml", "--data.corpus", f"files:{text}"]
