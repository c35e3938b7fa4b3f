"""A number that is none ends a run with its step and its culprit, and spoils no checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.cli import main
from train.lit import GPTModule
from train.running.checkpoint import candidates, read_checkpoint
from train.running.stop import StopAtNonFinite

FOLDER = Path("runs/tiny/checkpoints")

Plant = Callable[[GPTModule], object]


def gradient(module: GPTModule) -> object:
    """A kernel's backward that goes wrong for one weight."""
    weight = module.model.blocks[1].mlp["up"].weight
    return weight.register_hook(lambda grad: grad * float("nan"))


def backward(module: GPTModule) -> object:
    """A kernel's backward that goes wrong for its input, and so for all that lies before."""
    layer = module.model.blocks[1].attention.qkv
    return layer.register_full_backward_hook(lambda layer, grads, _: (grads[0] * float("inf"),))


def forward(module: GPTModule) -> object:
    """A layer that puts out one NaN."""

    def spoil(layer: torch.nn.Module, _: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, -1, 0] = float("nan")
        return output

    return module.model.blocks[0].attention.proj.register_forward_hook(spoil)


def plant_at(step: int, batch: int, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the ``batch``-th batch, from 1, of step ``step``, for that batch alone."""
    seen: list[int] = []
    hooks: list = []

    def start(self: GPTModule, *_: object) -> None:
        seen.append(self.global_step)
        while hooks:
            hooks.pop().remove()
        if self.global_step == step - 1 and seen.count(step - 1) == batch:
            hooks.append(plant(self))

    monkeypatch.setattr(GPTModule, "on_train_batch_start", start)


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that the run ends in."""
    assert main(arguments) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


CASES = [
    (gradient, "the gradient is not finite", "model.blocks.1.mlp.up", None),
    (backward, "the gradient is not finite", "model.tokens", "model.blocks.1.norm1"),
    (forward, "the loss is nan", "model.tokens", "model.norm"),
]


@pytest.mark.parametrize(("plant", "what", "first", "began"), CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_step_and_the_module_are_named(
    plant: Plant,
    what: str,
    first: str,
    began: str | None,
    batch: int,
    fit_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant_at(6, batch, plant, monkeypatch)
    options = ["--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_steps=5"]
    error = told([*fit_arguments, *options], capsys)
    assert f"{what} at step 6: the first module with a non-finite gradient is {first};" in error
    assert ("the backward pass, from the last to the first, began with" in error) == bool(began)
    assert began is None or f"began with {began};" in error
    spoiled = "in the forward pass model.blocks.0.attention.proj is the first with an output"
    assert (spoiled in error) == (plant is forward and batch == 2)
    newest = FOLDER / "step-00000005.ckpt"
    assert error.endswith(f"the last checkpoint is {newest}\n")
    assert candidates(FOLDER)[0] == newest
    assert all(weight.isfinite().all() for weight in read_checkpoint(newest)["state_dict"].values())


def test_a_run_that_blows_up_is_told(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.learning_rate=1e30", "--model.warmup_steps=4"]
    error = told([*fit_arguments, *options, "--checkpoint.every_n_steps=1"], capsys)
    assert "the loss is nan at step " in error
    assert "in the forward pass model.blocks.0." in error


def test_weights_that_an_update_spoiled_are_not_written(
    fit_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(self: GPTModule, *_: object) -> None:
        if self.global_step == 6:
            self.model.norm.weight.data[3] = float("inf")

    monkeypatch.setattr(GPTModule, "on_train_batch_end", spoil)
    error = told([*fit_arguments, "--checkpoint.every_n_steps=1"], capsys)
    assert "after step 6 model.norm has weights that are not finite; the last checkpoint" in error
    assert candidates(FOLDER)[0] == FOLDER / "step-00000005.ckpt"


@pytest.mark.parametrize(("every_n_steps", "updates"), [(50, 7), (6, 6)])
def test_where_a_look_costs_something_it_comes_later_and_names_the_same_step(
    every_n_steps: int,
    updates: int,
    fit_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a GPU: every 4 steps, and before a checkpoint."""
    begin = StopAtNonFinite.on_fit_start

    def begin_as_on_a_gpu(self: StopAtNonFinite, trainer: object, module: GPTModule) -> None:
        begin(self, trainer, module)
        self.every = 4

    made = [0]
    monkeypatch.setattr(
        GPTModule, "on_train_batch_end", lambda self, *_: made.append(self.global_step)
    )
    monkeypatch.setattr(StopAtNonFinite, "on_fit_start", begin_as_on_a_gpu)
    plant_at(6, 1, gradient, monkeypatch)
    options = [f"--checkpoint.every_n_steps={every_n_steps}", "--trainer.limit_val_batches=0"]
    error = told([*fit_arguments, *options], capsys)
    assert "the gradient is not finite at step 6: the first module with a non-finite" in error
    assert "gradient is model.blocks.1.mlp.up; there is no checkpoint yet" in error
    assert made[-1] == updates
