"""Every option of Lightning's Trainer does what Lightning says, or is refused in one sentence."""

import csv
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from train import RunError
from train.cli import main, make_parser
from train.proof.parity import train_arm
from train.running.trainer_options import FIT, PARITY

OPTIONS = [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]
FOLDER = Path("runs/tiny")


class Probe(L.Callback):
    """Notes what a run with the option under test did; the newest is ``Probe.last``."""

    last: "Probe"

    def __init__(self, stop_at: int | None = None) -> None:
        Probe.last = self
        self.stop_at = stop_at
        self.steps = self.batches = self.sanity_batches = 0
        self.validations: list[tuple[int, int]] = []  # step and batches
        self.modes: set[str] = set()
        self.gradients = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.trainer = trainer
        self.dtype = next(module.parameters()).dtype
        if torch.are_deterministic_algorithms_enabled():
            warn = torch.is_deterministic_algorithms_warn_only_enabled()
            self.modes.add("deterministic, warn" if warn else "deterministic")
        if torch.backends.cudnn.benchmark:
            self.modes.add("benchmark")

    def on_before_backward(self, *_: Any) -> None:
        if torch.is_anomaly_enabled():
            self.modes.add("anomaly")

    def on_before_zero_grad(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """What the step before was made with, clipped."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.gradients = torch.nn.utils.get_total_norm(gradients).item()
            self.largest = max(gradient.abs().max().item() for gradient in gradients)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps, self.batches = trainer.global_step, self.batches + 1
        if self.stop_at is not None and self.steps >= self.stop_at:
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validations.append((trainer.global_step, 0))

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.modes.add("inference" if torch.is_inference_mode_enabled() else "no inference")
        if trainer.sanity_checking:
            self.sanity_batches += 1
        else:
            step, batches = self.validations[-1]
            self.validations[-1] = step, batches + 1


class Notes(Logger):
    """A logger that keeps what it gets; the newest is ``Notes.last``."""

    last: "Notes"
    name, version = "notes", ""

    def __init__(self) -> None:
        super().__init__()
        Notes.last = self
        self.metrics: set[str] = set()
        self.hyperparameters: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= set(metrics)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.hyperparameters |= dict(params)


PROBE = ("--trainer.callbacks+", f"{Probe.__module__}.Probe")
NOTES = ("--trainer.logger+", f"{Notes.__module__}.Notes")


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning sets some options for the whole process: all off before, and as they were after."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("train.running.insight.MATMULS", 1)  # a third of a second a run
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.benchmark = False


def steps_logged() -> list[int]:
    with (FOLDER / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train_loss")]


def printed(text: str) -> Callable[[Probe, str], bool]:
    return lambda probe, output: text in output


def mode(name: str) -> Callable[[Probe, str], bool]:
    return lambda probe, output: name in probe.modes


def trained(steps: int) -> Callable[[Probe, str], bool]:
    return lambda probe, output: probe.steps == steps


# Option, its value, further arguments, and what must be seen of it. Two steps unless they say more.
Works = tuple[str, str, tuple[str, ...], Callable[[Probe, str], bool]]
SIX = ("--trainer.max_steps", "6")
FIT_WORKS: list[Works] = [
    ("precision", "32-true", (), lambda probe, _: probe.dtype == torch.float32),
    ("precision", "64", (), lambda probe, _: probe.dtype == torch.float64),
    ("precision", "bf16-true", (), lambda probe, _: probe.dtype == torch.bfloat16),
    ("precision", "bf16-mixed", (), lambda probe, _: probe.trainer.precision == "bf16-mixed"),
    ("logger", "true", (), lambda probe, _: probe.trainer.loggers[0].name == "tiny"),
    (
        "logger",
        NOTES[1],
        ("--trainer.log_every_n_steps", "1"),
        lambda *_: "train_loss" in Notes.last.metrics and steps_logged() == [0, 1],
    ),
    ("callbacks", "ModelSummary", (), trained(2)),
    ("callbacks", "ModelCheckpoint", (), trained(2)),
    ("callbacks", "TQDMProgressBar", (), trained(2)),
    ("max_steps", "3", (), trained(3)),
    ("min_steps", "4", (*SIX, "--trainer.callbacks.stop_at", "1"), trained(4)),
    ("min_steps", "0", (*SIX, "--trainer.callbacks.stop_at", "1"), trained(1)),
    ("min_steps", "null", (*SIX, "--trainer.callbacks.stop_at", "1"), trained(1)),
    ("max_time", "00:00:00:00", SIX, trained(0)),
    ("max_time", "{hours: 1}", (), trained(2)),
    (
        "limit_val_batches",
        "3",
        ("--trainer.val_check_interval", "2"),
        lambda probe, _: probe.validations == [(2, 3)],
    ),
    (
        "limit_val_batches",
        "0.5",
        ("--trainer.val_check_interval", "2"),
        lambda probe, _: probe.validations[0][1] == probe.trainer.num_val_batches[0] > 4,
    ),
    ("limit_val_batches", "0", (), lambda probe, _: probe.sanity_batches == 0),
    (
        "val_check_interval",
        "2",
        SIX,
        lambda probe, _: [step for step, _ in probe.validations] == [2, 4, 6],
    ),
    (
        "val_check_interval",
        "00:00:00:00",
        (),
        lambda probe, _: [step for step, _ in probe.validations] == [1, 2],
    ),
    ("val_check_interval", "{hours: 1}", SIX, lambda probe, _: probe.validations == []),
    ("num_sanity_val_steps", "0", (), lambda probe, _: probe.sanity_batches == 0),
    ("num_sanity_val_steps", "1", (), lambda probe, _: probe.sanity_batches == 1),
    (
        "num_sanity_val_steps",
        "-1",
        ("--trainer.limit_val_batches", "5"),
        lambda probe, _: probe.sanity_batches == 5,
    ),
    ("log_every_n_steps", "2", SIX, lambda *_: steps_logged() == [1, 3, 5]),
    ("log_every_n_steps", "0", (), lambda *_: not (FOLDER / "metrics.csv").exists()),
    ("enable_checkpointing", "true", (), lambda *_: (FOLDER / "checkpoints/last.ckpt").exists()),
    ("enable_progress_bar", "true", (), printed("step     0/2")),
    ("enable_progress_bar", "false", (), lambda _, output: "step     0/2" not in output),
    ("enable_model_summary", "true", (), printed("Trainable params")),
    ("enable_model_summary", "false", (), lambda _, output: "Trainable params" not in output),
    ("accumulate_grad_batches", "3", (), lambda probe, _: (probe.steps, probe.batches) == (2, 6)),
    ("gradient_clip_val", "0.01", (), lambda probe, _: 0.009 < probe.gradients < 0.0101),
    ("gradient_clip_val", "null", (), lambda probe, _: probe.gradients > 0.5),
    (
        "gradient_clip_algorithm",
        "value",
        ("--trainer.gradient_clip_val", "0.001"),
        lambda probe, _: probe.largest == pytest.approx(0.001),
    ),
    ("gradient_clip_algorithm", "norm", (), lambda probe, _: 0.9 < probe.gradients < 1.01),
    ("deterministic", "true", (), mode("deterministic")),
    ("deterministic", "warn", (), mode("deterministic, warn")),
    ("benchmark", "true", (), mode("benchmark")),
    # Of a validation outside a fit, which only an arm has: within one it is no_grad.
    ("inference_mode", "false", (), mode("no inference")),
    ("profiler", "simple", (), printed("run_training_batch")),
    ("profiler", "advanced", (), printed("Ordered by: cumulative time")),
    ("profiler", "SimpleProfiler", (), printed("run_training_batch")),
    ("detect_anomaly", "true", (), mode("anomaly")),
    ("enable_autolog_hparams", "true", NOTES, lambda *_: "gpt" in Notes.last.hyperparameters),
    ("enable_autolog_hparams", "false", NOTES, lambda *_: Notes.last.hyperparameters == {}),
]
# All at once: values that ask for nothing but what is done anyway.
FIT_TAKES: dict[str, str] = {
    "accelerator": "auto",
    "strategy": "auto",
    "devices": "1",
    "num_nodes": "1",
    "fast_dev_run": "false",
    "max_epochs": "-1",
    "min_epochs": "0",
    "limit_train_batches": "1.0",
    "limit_test_batches": "1.0",
    "limit_predict_batches": "1.0",
    "overfit_batches": "0.0",
    "check_val_every_n_epoch": "null",
    "use_distributed_sampler": "false",
    "barebones": "false",
    "plugins": "null",
    "sync_batchnorm": "true",  # of none
    "reload_dataloaders_every_n_epochs": "0",
    "default_root_dir": "null",
    "model_registry": "null",
}
CPU = "lightning.pytorch.accelerators.CPUAccelerator"
EPOCHS = "a run counts steps, its batches never end"
# Option, its value, and what the sentence says.
FIT_REFUSES: list[tuple[str, str, str]] = [
    ("accelerator", "warp", "invalid accelerator name"),
    ("accelerator", "tpu", "'torch_xla"),
    ("accelerator", f"{{class_path: {CPU}}}", "trainer.accelerator must be a name"),
    ("strategy", "ddp", "parallel.shard say how a run is spread over processes"),
    ("devices", "2", "trainer.devices (2) must be parallel.data x parallel.context"),
    ("devices", "-1", "trainer.devices (-1) must be"),
    ("num_nodes", "2", "parallel.shard say how a run is spread over processes"),
    ("precision", "16-true", "epsilon, 1e-8, is 0 in fp16"),
    ("precision", "transformer-engine", "transformer_engine"),
    ("precision", "8-true", "trainer.precision"),
    ("logger", "false", "fit logs to metrics.csv"),
    ("callbacks", "NoSuchCallback", "trainer.callbacks"),
    ("fast_dev_run", "true", "trainer.max_steps under a --name of its own"),
    ("fast_dev_run", "3", "trainer.fast_dev_run must be left alone, not 3"),
    ("max_epochs", "1", f"trainer.max_epochs must be left alone, not 1: {EPOCHS}"),
    ("max_epochs", "0", "use trainer.max_steps"),
    ("min_epochs", "1", "use trainer.min_steps"),
    ("max_steps", "-1", "trainer.max_steps must be at least 1, not -1"),
    ("max_steps", "0", "trainer.max_steps must be at least 1, not 0"),
    ("min_steps", "-1", "trainer.min_steps must be at least 0"),
    ("max_time", "soon", "Expected a string in the format DD:HH:MM:SS"),
    ("max_time", "{moons: 1}", "moons"),
    ("limit_train_batches", "5", "data.max_bytes for less text"),
    ("limit_train_batches", "0.5", "data.max_bytes for less text"),
    ("limit_val_batches", "-1", "invalid value -1 for limit_val_batches"),
    ("limit_val_batches", "1.5", "invalid value 1.5 for limit_val_batches"),
    ("limit_val_batches", "0.0001", "batches is less than one: give at least"),
    ("limit_test_batches", "2", "neither a test nor a prediction"),
    ("limit_predict_batches", "0.5", "neither a test nor a prediction"),
    ("overfit_batches", "2", "data.max_bytes for less text"),
    ("overfit_batches", "0.1", "data.max_bytes for less text"),
    ("val_check_interval", "0.5", f"not 0.5: {EPOCHS}"),
    ("val_check_interval", "1.0", f"not 1.0: {EPOCHS}"),
    ("val_check_interval", "null", f"not None: {EPOCHS}"),
    ("val_check_interval", "0", f"not 0: {EPOCHS}"),
    ("val_check_interval", "-3", f"not -3: {EPOCHS}"),
    ("val_check_interval", "soon", "Expected 'DD:HH:MM:SS'"),
    ("check_val_every_n_epoch", "1", "use trainer.val_check_interval"),
    ("num_sanity_val_steps", "-2", "trainer.num_sanity_val_steps must be at least -1"),
    ("log_every_n_steps", "-1", "trainer.log_every_n_steps must be at least 0"),
    ("enable_checkpointing", "false", "use checkpoint.every_n_steps"),
    ("enable_progress_bar", "perhaps", "trainer.enable_progress_bar"),
    ("enable_model_summary", "perhaps", "trainer.enable_model_summary"),
    ("accumulate_grad_batches", "0", "trainer.accumulate_grad_batches must be at least 1, not 0"),
    ("gradient_clip_val", "much", "trainer.gradient_clip_val"),
    ("gradient_clip_algorithm", "vague", "Allowed algorithms: ['value', 'norm']"),
    ("deterministic", "perhaps", "trainer.deterministic"),
    ("benchmark", "perhaps", "trainer.benchmark"),
    ("inference_mode", "perhaps", "trainer.inference_mode"),
    ("use_distributed_sampler", "true", "all ranks read the same batches"),
    ("profiler", "quick", "['simple', 'advanced', 'pytorch', 'xla']"),
    ("profiler", "xla", "PyTorch/XLA is not installed"),
    ("detect_anomaly", "perhaps", "trainer.detect_anomaly"),
    ("barebones", "true", "trainer.barebones must be left alone, not True"),
    ("plugins", "TorchCheckpointIO", "trainer.plugins must be left alone"),
    ("sync_batchnorm", "perhaps", "trainer.sync_batchnorm"),
    ("reload_dataloaders_every_n_epochs", "1", EPOCHS),
    ("default_root_dir", "elsewhere", "the run's folder is runs/<name>"),
    ("enable_autolog_hparams", "perhaps", "trainer.enable_autolog_hparams"),
    ("model_registry", "model", "a run is kept in runs/<name>"),
]
PARITY_REFUSES: list[tuple[str, str, str]] = [
    ("accelerator", "warp", "invalid accelerator name"),
    ("fast_dev_run", "true", "trainer.max_steps under a --name of its own"),
    ("max_epochs", "1", f"trainer.max_epochs must be left alone, not 1: {EPOCHS}"),
    ("limit_train_batches", "5", "data.max_bytes for less text"),
    ("barebones", "true", "trainer.barebones must be left alone, not True"),
    ("plugins", "TorchCheckpointIO", "trainer.plugins must be left alone"),
    ("gradient_clip_algorithm", "vague", "Allowed algorithms: ['value', 'norm']"),
    ("logger", "true", "report's metrics.csv"),
    ("logger", NOTES[1], "report's metrics.csv"),
    ("enable_checkpointing", "true", "an arm is trained in one go"),
    ("num_sanity_val_steps", "2", "the loss at step 0"),
    ("log_every_n_steps", "1", "report's metrics.csv"),
    ("max_time", "00:01:00:00", "arms must train on the same steps"),
    ("val_check_interval", "00:00:00:01", "arms must train on the same steps"),
    ("val_check_interval", "0.5", "arms must train on the same steps"),
    ("limit_val_batches", "0", "arms are judged by it"),
    ("limit_val_batches", "-1", "arms are judged by it"),
    ("accumulate_grad_batches", "2", "arms are compared batch by batch"),
    ("profiler", "simple", "it would slow down what is measured"),
    ("precision", "transformer-engine", "trainer.precision must be 32-true"),
    ("callbacks", "ModelCheckpoint", "enable_checkpointing=False"),
]
PARITY_WORKS: list[Works] = [
    ("precision", "bf16-mixed", (), lambda probe, _: probe.trainer.precision == "bf16-mixed"),
    ("callbacks", "ModelSummary", (), trained(2)),
    ("logger", "false", (), trained(2)),
    ("enable_checkpointing", "false", (), trained(2)),
    ("enable_progress_bar", "false", (), lambda _, output: "step" not in output),
    ("enable_model_summary", "true", (), printed("Trainable params")),
    ("min_steps", "2", (), trained(2)),
    (
        "limit_val_batches",
        "3",
        ("--trainer.val_check_interval", "2"),
        lambda probe, _: (probe.sanity_batches, probe.validations) == (3, [(2, 3)]),
    ),
    ("gradient_clip_val", "0.01", (), lambda probe, _: 0.009 < probe.gradients < 0.0101),
    ("inference_mode", "true", (), mode("inference")),
    ("inference_mode", "false", (), lambda probe, _: "inference" not in probe.modes),
    ("deterministic", "true", (), mode("deterministic")),
    ("detect_anomaly", "true", (), mode("anomaly")),
]


def arguments(option: str, value: str, further: tuple[str, ...] = ()) -> list[str]:
    """A run of two steps with a probe, in which the option comes last."""
    given = [f"--trainer.{option}{'+' * (option in ('callbacks', 'logger'))}", value]
    if option == "logger" and value in ("true", "false"):
        given[0] = "--trainer.logger"
    return ["--trainer.max_steps", "2", *PROBE, *further, *given]


@pytest.mark.parametrize("table", [FIT, PARITY])
def test_every_option_of_lightning_is_in_the_table(table: dict[str, object]) -> None:
    assert sorted(table) == sorted(OPTIONS)


def test_every_option_of_lightning_is_tried() -> None:
    worked, refused = ({case[0] for case in cases} for cases in (FIT_WORKS, FIT_REFUSES))
    assert worked | set(FIT_TAKES) == set(OPTIONS)
    assert refused == set(OPTIONS)


def test_an_option_that_lightning_adds_is_refused_until_it_is_in_the_table(
    fit_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(FIT, "benchmark")
    assert main([*fit_arguments, "--trainer.max_steps", "1"]) == 0
    capsys.readouterr()
    assert main([*fit_arguments, "--trainer.benchmark", "true"]) == 2
    assert "fit does not know this option of Lightning" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value", "further", "seen"), FIT_WORKS)
@pytest.mark.filterwarnings("ignore:`precision=64` is supported for historical reasons")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_does_what_the_option_says(
    option: str,
    value: str,
    further: tuple[str, ...],
    seen: Callable[[Probe, str], bool],
    fit_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*fit_arguments, *arguments(option, value, further)]) == 0
    assert seen(Probe.last, capsys.readouterr().out), Probe.last.modes


def test_fit_takes_every_default_by_its_name(fit_arguments: list[str]) -> None:
    given = [f"--trainer.{name}={value}" for name, value in FIT_TAKES.items()]
    assert main([*fit_arguments, "--trainer.max_steps", "2", *PROBE, *given]) == 0
    assert Probe.last.steps == 2
    nulls = [f"--trainer.{name}=null" for name in ("max_epochs", "min_epochs", "logger")]
    assert main([*fit_arguments, "--trainer.max_steps", "3", *PROBE, *nulls]) == 0
    assert Probe.last.steps == 3


def test_what_callbacks_keep_is_in_the_checkpoint_that_a_run_goes_on_from(
    fit_arguments: list[str],
) -> None:
    stopping = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]
    best = ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.monitor", "val_loss"]
    time = ["--trainer.max_time", "00:01:00:00"]
    line = [*fit_arguments, *PROBE, *stopping, *best, *time, "--trainer.val_check_interval", "1"]
    assert main([*line, "--trainer.max_steps", "3"]) == 0
    assert main([*line, "--trainer.max_steps", "5"]) == 0
    states = {type(one).__name__: one.state_dict() for one in Probe.last.trainer.callbacks}
    assert [step for step, _ in Probe.last.validations] == [4, 5]
    assert states["Timer"]["time_elapsed"]["train"] > 0
    validated = torch.load(FOLDER / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    (found,) = (state for name, state in validated.items() if name.startswith("EarlyStopping"))
    assert found["best_score"] == states["EarlyStopping"]["best_score"] < 5.5


def test_the_run_of_no_time_promises_no_checkpoint(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*fit_arguments, "--trainer.max_time", "00:00:00:00"]) == 0
    assert capsys.readouterr().out.endswith("trained 0 steps\n")


def test_ranks_validate_by_batches_and_not_by_their_clocks(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*fit_arguments, "--parallel.data", "2", "--trainer.val_check_interval", "00:00:01:00"]
    refused(line, "trainer.val_check_interval must be a number of batches with more than", capsys)


def test_an_arm_that_ends_early_is_no_arm(parity_arguments: list[str]) -> None:
    line = [*parity_arguments, *PROBE, "--trainer.callbacks.stop_at", "3"]
    with pytest.raises(RunError, match="ended the arm flash after 3 of 12 steps"):
        train_arm(make_parser().parse_args(line).parity, "flash")


def test_the_status_of_a_failed_verdict_is_no_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash() -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("train.cli.main", crash)
    monkeypatch.setattr(sys, "warnoptions", [])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("train", run_name="__main__")
    assert exit_.value.code == 3
    assert "ZeroDivisionError: a fault of ours" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value", "words"), FIT_REFUSES)
def test_fit_refuses_the_option_in_one_sentence(
    option: str,
    value: str,
    words: str,
    fit_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused([*fit_arguments, *arguments(option, value)], words, capsys)


@pytest.mark.parametrize(("option", "value", "words"), PARITY_REFUSES)
def test_parity_refuses_the_option_in_one_sentence(
    option: str,
    value: str,
    words: str,
    parity_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused([*parity_arguments, *arguments(option, value)], words, capsys)


def refused(line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert words in told.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(("option", "value", "further", "seen"), PARITY_WORKS)
def test_an_arm_does_what_the_option_says(
    option: str,
    value: str,
    further: tuple[str, ...],
    seen: Callable[[Probe, str], bool],
    parity_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = [*parity_arguments, *arguments(option, value, further)]
    train_arm(make_parser().parse_args(line).parity, "flash")
    assert seen(Probe.last, capsys.readouterr().out), Probe.last.modes
