"""What a run logs is what happened, and logging it changes nothing."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from train import cli
from train.lit import GPTModule
from train.measure import Yardstick
from train.model import GPT, GPTConfig
from train.running import insight
from train.running.insight import flops_per_token, watched

RUN = Path("runs/tiny")
SHAPE = GPTConfig(vocab_size=50, context=24, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize("attention", ["flash", "standard", "control", "sdpa"])
def test_statistics_are_those_of_the_matrix(attention: str) -> None:
    """Whatever the model attends with: of the keys that its own layers project."""
    model, tokens = GPT(GPTConfig(**vars(SHAPE) | {"attention": attention})), torch.arange(24)
    layer: Any = model.blocks[0].attention
    layer.qkv.weight.data.mul_(100)
    seen = []
    layer.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with watched(model) as layers:
        model(tokens[None])
    q, k, _ = seen[0].unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).double()
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf)
    entropy, logit = (x.double() for x in layers[0])
    assert scores.amax() > 10
    torch.testing.assert_close(logit, scores.amax(-1), atol=1e-4, rtol=1e-5)
    expected = torch.special.entr(scores.softmax(-1)).sum(-1)
    torch.testing.assert_close(entropy, expected, atol=1e-4, rtol=0)


def test_every_layer_is_watched_and_let_go() -> None:
    model, tokens = GPT(SHAPE), torch.randint(50, (3, 24))
    before = model(tokens)
    with watched(model) as layers:
        torch.testing.assert_close(model(tokens), before)
    assert [x.shape for layer in layers for x in layer] == [(3, 2, 24)] * 4
    with pytest.raises(ZeroDivisionError), watched(model) as layers:
        raise ZeroDivisionError
    model(tokens)
    assert layers == []


def test_model_flops_are_those_that_pytorch_counts_but_for_the_hidden_keys() -> None:
    """PyTorch counts the products alone, and the scores of the standard formula in full."""
    model, tokens = GPT(GPTConfig(**vars(SHAPE) | {"attention": "standard"})), 5 * 24
    with FlopCounterMode(display=False) as counter:
        model.loss(torch.randint(50, (5, 25))).backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    attention = {keys: 12 * 2 * 16 * keys for keys in (24, 25 / 2)}
    expected = counter.get_total_flops() / tokens - attention[24] + attention[25 / 2] + 6 * vectors
    assert flops_per_token(model) == expected


def rows() -> list[dict[str, float]]:
    """The CSV file, without what a row leaves empty."""
    with (RUN / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes a second, one of validation 100; the device can do 1e9 FLOP/s."""
    now = [0.0]

    def taking(seconds: float, name: str) -> None:
        original = getattr(GPTModule, name)

        def step(self: GPTModule, batch: dict[str, Tensor]) -> Any:
            now[0] += seconds
            return original(self, batch)

        monkeypatch.setattr(GPTModule, name, step)

    taking(1.0, "training_step")
    taking(100.0, "validation_step")
    monkeypatch.setattr(insight, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Yardstick, "peak", lambda self: 1e9)


@pytest.mark.usefixtures("clock")
def test_speed_counts_every_batch_of_a_step_and_no_validation(fit_arguments: list[str]) -> None:
    options = ["--trainer.accumulate_grad_batches", "2", "--trainer.log_every_n_steps", "3"]
    assert cli.main([*fit_arguments, *options]) == 0
    found = [row for row in rows() if "tokens_per_second" in row]
    assert [row["step"] for row in found] == [2, 5, 8, 11]
    flops = flops_per_token(GPT(GPTConfig(context=32, n_layer=2, n_head=2, n_embd=32)))
    for row in found:
        assert {"train_loss", "grad_norm", "learning_rate", "peak_memory_bytes"} <= set(row)
        assert row["tokens_per_second"] == 4 * 32
        assert row["mfu"] == pytest.approx(4 * 32 * flops / 1e9)
        assert 2**26 < row["peak_memory_bytes"] < 2**36
    # The factor of the warm-up over 5 steps, then of the cosine, of the update itself.
    assert found[0]["learning_rate"] == pytest.approx(3e-3 * 3 / 5)
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * 6 / 7))
    assert found[-1]["learning_rate"] == pytest.approx(3e-3 * cosine)


def test_a_run_with_insight_is_bit_equal_to_one_without(
    fit_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--insight.attention", "true", "--insight.every", "5"]
    arguments = [*fit_arguments, "--trainer.log_every_n_steps", "1"]
    assert cli.main([*arguments, *options]) == 0
    watched_run = rows()
    check_attention_rows(watched_run)
    weights = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    Path("runs").rename("watched")

    monkeypatch.setattr(cli, "Insight", lambda options: L.Callback())
    assert cli.main(arguments) == 0
    assert not any("mfu" in row for row in rows())
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert [row.get(name) for row in rows() if name in row] == [
            row.get(name) for row in watched_run if name in row
        ]
    plain = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(plain[name], weights[name]) for name in weights)


def check_attention_rows(found: list[dict[str, float]]) -> None:
    """In the CSV file and in TensorBoard's."""
    tags = [f"{name}/layer_{i}" for name in ("attention_entropy", "max_logit") for i in (0, 1)]
    attention = [row for row in found if tags[0] in row]
    assert [row["step"] for row in attention] == [4, 9]
    board = EventAccumulator(str(RUN / "tensorboard")).Reload()
    for tag in (*tags, "train_loss", "mfu", "learning_rate"):
        written = [(row["step"], row[tag]) for row in found if tag in row]
        assert [(e.step, pytest.approx(e.value)) for e in board.Scalars(tag)] == written
    # At so small weights attention is nearly even: query i spreads over i + 1 keys.
    even = sum(math.log(keys) for keys in range(1, 33)) / 32
    assert attention[0]["attention_entropy/layer_0"] == pytest.approx(even, abs=0.01)


def test_without_tensorboard_there_is_the_csv_file(
    fit_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(insight, "find_spec", lambda name: None)
    options = ["--trainer.max_steps", "1", "--trainer.log_every_n_steps", "1"]
    assert cli.main([*fit_arguments, *options]) == 0
    assert not (RUN / "tensorboard").exists()
    assert rows()


def test_the_dtype_of_the_yardstick_is_that_of_the_products(fit_arguments: list[str]) -> None:
    seen = []
    original = Yardstick.__init__

    def spy(self: Yardstick, device: torch.device, dtype: torch.dtype) -> None:
        seen.append(dtype)
        original(self, device, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Yardstick, "__init__", spy)
        options = ["--trainer.precision", "bf16-mixed", "--trainer.max_steps", "1"]
        assert cli.main([*fit_arguments, *options]) == 0
    assert seen == [torch.bfloat16]


def test_ranks_log_what_one_process_does(
    fit_arguments: list[str], datasets_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences shared out over two processes: the same losses and the same attention."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(datasets_cache))
    options = ["--trainer.max_steps", "4", "--trainer.log_every_n_steps", "2"]
    options += ["--insight.attention", "true", "--insight.every", "2"]
    logged = []
    for ranks in ("1", "2"):
        assert cli.main([*fit_arguments, *options, "--parallel.context", ranks]) == 0
        logged.append(rows())
        RUN.rename(f"on-{ranks}")
    own = ("tokens_per_second", "mfu", "peak_memory_bytes")
    for one, two in zip(*logged, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - set(own):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name
