"""Mistakes are told in one sentence; a run goes on where it stopped, to the bit."""

import csv
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from train.cli import main
from train.lit import GPTModule

CHECKPOINT = Path("runs/tiny/checkpoints/last.ckpt")


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a mistaken command ends in, before it has written anything."""
    sentence = told_by(arguments, capsys)
    assert not Path("runs").exists()
    return sentence


def told_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a mistaken command ends in."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "unknown.yaml"], "model.gpt.n_layers"),
        (["--config", "broken.yaml"], "Problems parsing config"),
        (["--model.gpt.n_layer", "many"], "model.gpt.n_layer"),
        (["--model.gpt.depth", "3"], "--model.gpt.depth"),
        (["--data.corpus", "files:nothing/*.txt"], "no file matches"),
        (["--data.corpus", "files:empty.txt"], "the corpus is empty"),
        (["--data.tokenizer", "words"], "error: unknown tokenizer 'words'"),
        (["--model.gpt.context", "1000000"], "lower model.gpt.context"),
        (["--model.gpt.attention", "flush"], "unknown attention 'flush': choose one of"),
        (["--model.gpt.n_head", "5"], "n_embd (32) must be a multiple of n_head (5)"),
        (["--trainer.max_steps", "0"], "trainer.max_steps must be at least 1"),
        (["--trainer.devices", "2"], "(1 x 1 = 1)"),
        (["--trainer.strategy", "ddp"], "parallel.shard say how a run is spread"),
        (["--parallel.data", "0"], "parallel.data must be at least 1, not 0"),
        (["--parallel.shards", "2"], "--parallel.shards"),
        (["--parallel.shard", "true"], "parallel.shard needs more than one rank"),
        (["--trainer.precision", "7"], "trainer.precision"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "parity"])
def test_mistakes(
    command: str,
    options: list[str],
    words: str,
    fit_arguments: list[str],
    parity_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("unknown.yaml").write_text("model: {gpt: {n_layers: 3}}")
    Path("broken.yaml").write_text("model: {broken")
    Path("empty.txt").touch()
    arguments = {"fit": fit_arguments, "parity": parity_arguments}[command]
    assert words in told([*arguments, *options], capsys)


@pytest.mark.parametrize("command", ["fit", "parity"])
def test_under_torchrun(
    command: str,
    fit_arguments: list[str],
    parity_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    arguments = {"fit": fit_arguments, "parity": parity_arguments}[command]
    assert "run it without torchrun" in told(arguments, capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": 3}, "data.batch_size (4) must be a multiple of parallel.data (3)"),
        ({"context": 3}, "model.gpt.context (32) must be a multiple of 6 for parallel.context 3"),
        ({"context": 3, "placement": "contiguous"}, "must be a multiple of 3"),
        ({"context": 4, "attention": "ulysses"}, "n_head (2) must be a multiple of parallel.conte"),
        ({"context": 2, "attention": "star"}, "star"),
        ({"context": 2, "data": 2.5}, "2.5"),
    ],
)
def test_what_ranks_cannot_share(
    options: dict[str, object],
    words: str,
    fit_arguments: list[str],
    parity_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_the_line = [f"--parallel.{name}={value}" for name, value in options.items()]
    assert words in told([*fit_arguments, *on_the_line], capsys)
    spread = ["--parity.arms.spread", "flash"]
    layouts = ["--parity.layouts", yaml.safe_dump({"spread": options})]
    assert words in told([*parity_arguments, *spread, *layouts], capsys)


@pytest.mark.parametrize("attention", ["standard", "control", "sdpa"])
def test_what_cannot_attend_across_ranks(
    attention: str, fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--parallel.context", "2", "--model.gpt.attention", attention]
    told_ = told([*fit_arguments, *options], capsys)
    assert f"attention '{attention}' can't attend across ranks" in told_


def test_devices_that_are_no_product_of_the_axes(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--parallel.context", "2", "--parallel.data", "2", "--trainer.devices", "2"]
    assert "(2 x 2 = 4), or be left out" in told([*fit_arguments, *options], capsys)


def test_fewer_gpus_than_ranks(
    fit_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    arguments = [*fit_arguments, "--trainer.accelerator", "auto", "--parallel.data", "2"]
    assert "is 2 and this machine has 1 GPU: set trainer.accelerator" in told(arguments, capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--parallel.data", "2"], "parity.layouts spreads arms over processes"),
        (["--parity.layouts", "{ddp: {data: 2}}"], "parity.layouts.ddp must be an arm"),
        (["--parity.layouts", "{control: {data: 2}}"], "besides standard, flash and control"),
        (["--parity.arms", "{standard: standard, flash: flash}"], "parity.arms lacks control"),
        (["--parity.arms.flash", "flush"], "unknown attention 'flush'"),
        (["--parity.rule.bound", "1"], "--parity.rule.bound"),
        (["--parity.layer.lengths", "[]"], "layer.lengths"),
        (["--trainer.accumulate_grad_batches", "2"], "batch by batch"),
        (["--trainer.precision", "transformer-engine"], "trainer.precision"),
    ],
)
def test_mistakes_in_a_proof(
    options: list[str],
    words: str,
    parity_arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in told([*parity_arguments, *options], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told(
    parity_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "finds no GPU" in told([*parity_arguments, "--trainer.accelerator", "gpu"], capsys)


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["parity"], ["fit"], ["sample"], ["sample", "--checkpoint", "x"]]
)
def test_a_command_that_lacks_something(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told(arguments, capsys)


def losses() -> dict[int, str]:
    """Training loss by step, as written: a step that is there twice fails."""
    with Path("runs/tiny/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]
    found = {int(row["step"]): row["train_loss"] for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_that_resumes_to_the_bit(
    signum: signal.Signals,
    status: int,
    fit_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*fit_arguments, "--trainer.log_every_n_steps", "1"]
    assert main(arguments) == 0
    whole, weights = losses(), torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    assert list(whole) == list(range(12))
    Path("runs").rename("uninterrupted")

    def be_stopped(self: GPTModule, batch: object, batch_idx: int) -> None:
        if self.global_step == 7:
            os.kill(os.getpid(), signum)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(GPTModule, "on_train_batch_start", be_stopped)
        assert main(arguments) == status
    printed = capsys.readouterr()
    assert "stopped at step 8: the same command goes on" in printed.out
    assert printed.err == "interrupted\n"
    assert torch.load(CHECKPOINT, weights_only=True)["global_step"] == 8

    assert main(arguments) == 0
    assert "from step 8 on: " in capsys.readouterr().out
    assert losses() == whole
    resumed = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_signal_stops_at_once(
    fit_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press_twice(self: GPTModule, batch: object, batch_idx: int) -> None:
        if self.global_step == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(GPTModule, "on_train_batch_start", press_twice)
    assert main([*fit_arguments, "--checkpoint.every_n_steps", "5"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert torch.load(CHECKPOINT, weights_only=True)["global_step"] == 6  # the best so far


def test_a_checkpoint_of_another_run_is_not_continued(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments) == 0
    capsys.readouterr()
    assert main([*fit_arguments, "--model.learning_rate", "0.5"]) == 2
    assert "was made with another learning_rate (0.003, now 0.5)" in capsys.readouterr().err
    assert main([*fit_arguments, "--seed", "9"]) == 2
    assert "another seed (0, now 9)" in capsys.readouterr().err


def test_sample_continues_a_prompt(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments) == 0
    capsys.readouterr()
    sample = ["sample", "--checkpoint", str(CHECKPOINT), "--count", "40"]

    def printed(*options: str) -> str:
        assert main([*sample, *options]) == 0
        return capsys.readouterr().out

    continued = printed("--prompt", "def ", "--top_k", "1")
    assert continued.startswith("def ")
    assert len(continued) > len("def \n")
    assert printed("--prompt", "def ", "--top_k", "1", "--attention", "standard") == continued
    assert printed("--seed", "1") != printed("--seed", "2")

    Path("no checkpoint").write_text("text")
    torch.save({}, "other.ckpt")
    for options, words in (
        (["--prompt", "x" * 33], "the prompt has 33 tokens and the model's context is 32"),
        (["--checkpoint", "missing.ckpt"], "there is no checkpoint missing.ckpt"),
        (["--checkpoint", "no checkpoint"], "no checkpoint is not a checkpoint, or"),
        (["--checkpoint", "other.ckpt"], "other.ckpt is not a checkpoint of python -m train fit"),
        (["--attention", "flush"], "unknown attention 'flush'"),
        (["--temperature", "0"], "temperature above 0"),
    ):
        assert main([*sample, *options]) == 2
        assert words in capsys.readouterr().err


def test_a_prompt_is_read_as_its_bytes(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments) == 0
    capsys.readouterr()
    sample = ["sample", "--checkpoint", str(CHECKPOINT), "--count", "3", "--prompt"]
    for prompt in ("a<|endofdocument|>b", "\r\n\r\ufeff", " \0 "):
        assert main([*sample, prompt]) == 0
        assert capsys.readouterr().out.startswith(prompt)
    assert main([*sample, "bytes \udcff"]) == 2  # as Python passes on an argument b"bytes \xff"
    assert "the prompt must be UTF-8 text, and is none at character 6" in capsys.readouterr().err


def test_what_a_model_wrote_is_printed_on_any_terminal(
    fit_arguments: list[str], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main([*fit_arguments, "--trainer.max_steps", "1"]) == 0
    capsysbinary.readouterr()
    sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]
    assert main(["sample", "--checkpoint", str(CHECKPOINT), "--prompt", "ä", "--count", "1"]) == 0
    assert capsysbinary.readouterr().out.startswith(b"\\xe4")


@pytest.mark.parametrize("command", [[], ["parity"], ["fit"], ["sample"], ["compare"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage: python -m train" in capsys.readouterr().out
