"""``python -m train {parity,fit,sample,compare}``: the commands, and how errors are reported."""

import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer

from train import RunError, UsageError
from train.config import RUNS, as_parallel, build, check, quiet, training_parser
from train.data import END_OF_DOCUMENT, TextData, literal
from train.lit import GPTModule
from train.model import GPTConfig
from train.proof.compare import compare
from train.proof.parity import ParityOptions, run_parity
from train.running.checkpoint import (
    BadCheckpoint,
    CheckpointOptions,
    Checkpoints,
    WholeCheckpointIO,
    candidates,
    last_good,
    read_checkpoint,
)
from train.running.disk import held
from train.running.insight import Insight, InsightOptions, boards
from train.running.metrics import MetricsFile
from train.running.ranks import in_ranks
from train.running.stop import StopAtNonFinite, StopAtSignal, Stopped


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 done, 1 the verdict is fail, 2 a mistake in the request, 3 a run that
        could not go on, 130 Ctrl-C, 143 SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    quiet()
    try:
        config = make_parser().parse_args(arguments)
        command = config.subcommand
        if command == "sample":
            _print_text(sample(**config.sample.as_dict()))
        elif command == "compare":
            print(compare(**config.compare.as_dict()))
        elif command == "fit":
            fit(config.fit)
        else:
            summary = run_parity(config.parity, shlex.join(["python", "-m", "train", *arguments]))
            return 0 if summary["verdict"] == "pass" else 1
    except (ArgumentError, UsageError, MisconfigurationException) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 3
    except (KeyboardInterrupt, Stopped) as stop:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    return 0


def _print_text(text: str) -> None:
    """Print a model's text; characters outside the terminal's encoding as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="backslashreplace").decode(encoding))


def _sentence(error: BaseException) -> str:
    """The message on one line; of an error that wraps a UsageError, the UsageError's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UsageError):
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(cause or error).split())


def make_parser() -> ArgumentParser:
    """The parser of ``python -m train``."""
    parser = ArgumentParser(prog="python -m train", description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands(required=True)
    parity = parity_parser()
    sampling = ArgumentParser(
        description="Continue a prompt with a trained GPT.", exit_on_error=False
    )
    sampling.add_function_arguments(sample)
    comparing = ArgumentParser(
        description="Lay the curves of several runs over each other.", exit_on_error=False
    )
    comparing.add_argument(
        "runs", type=Path, nargs="+", help="folders of fit or parity runs, such as runs/a"
    )
    comparing.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder for the table and plots"
    )
    commands.add_subcommand(
        "parity", parity, help="train with several attentions and judge whether they agree"
    )
    commands.add_subcommand("fit", fit_parser(), help="train one GPT, with checkpoints")
    commands.add_subcommand("sample", sampling, help="continue a prompt with a trained GPT")
    commands.add_subcommand("compare", comparing, help="lay the curves of runs over each other")
    return parser


def parity_parser() -> ArgumentParser:
    """The parser of ``python -m train parity``."""
    parser = training_parser(
        "Train the same GPT with several attentions and judge whether they agree."
    )
    parser.add_argument("--parity", type=ParityOptions, default=ParityOptions())
    return parser


def fit_parser() -> ArgumentParser:
    """The parser of ``python -m train fit``."""
    parser = training_parser(
        "Train one GPT; run the same command again to go on from its last good checkpoint."
    )
    parser.add_argument("--insight", type=InsightOptions, default=InsightOptions())
    parser.add_argument("--checkpoint", type=CheckpointOptions, default=CheckpointOptions())
    return parser


def fit(config: Namespace) -> None:
    """Train one GPT into ``runs/<name>/``, from its last good checkpoint on if there is one.

    Raises:
        Stopped: after Ctrl-C or SIGTERM, once the checkpoint is saved.
        RunError: the run can't go on; its last good checkpoint is as it was.
    """
    check(config, "fit", logger=[], plugins=[WholeCheckpointIO()])
    InsightOptions(**config.insight.as_dict())
    CheckpointOptions(**config.checkpoint.as_dict())
    folder = RUNS / config.name / "checkpoints"
    try:
        with held(folder.parent):
            in_ranks(as_parallel(config.parallel).ranks, fit_rank, config, folder)
    except RunError as error:
        last = next(iter(candidates(folder)), None)
        left = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        raise RunError(f"{error}; {left}") from error


def fit_rank(config: Namespace, folder: Path) -> None:
    """What each process of the run does, with its checkpoints in ``folder``."""
    found = last_good(folder)
    path, step = (found[0], found[1]["global_step"]) if found else (None, 0)
    metrics, stop = MetricsFile(RUNS / config.name), StopAtSignal()
    trainer, module, data = build(
        config,
        callbacks=[
            stop,
            Checkpoints(folder, CheckpointOptions(**config.checkpoint.as_dict())),
            StopAtNonFinite(config.trainer.log_every_n_steps or 50),
            Insight(InsightOptions(**config.insight.as_dict())),
        ],
        label=config.name,
        logger=[metrics, *boards(RUNS / config.name, step)],
        plugins=[WholeCheckpointIO()],
    )
    if found:
        _require_same_run(*found, module, data)
        print(f"from step {step} on: {path}")
    del found  # Lightning reads the file again: don't hold two copies of the state
    metrics.cut(step)
    try:
        with stop:
            trainer.fit(module, data, ckpt_path=path, weights_only=True)
    except Stopped as stopped:
        if not stopped.at_once and trainer.global_step:
            print(
                f"stopped at step {trainer.global_step}: the same command goes on from "
                f"{folder / 'last.ckpt'}"
            )
        raise
    # No step, where trainer.max_time was over at once: then there is no checkpoint.
    kept = f": {folder / 'last.ckpt'}" if trainer.global_step else ""
    print(f"trained {trainer.global_step} steps{kept}")


def _require_same_run(path: Path, saved: dict[str, Any], module: GPTModule, data: TextData) -> None:
    """Refuse to resume with other options than those the checkpoint was made with."""
    for part, now in (
        ("hyper_parameters", module.hparams),
        ("datamodule_hyper_parameters", data.hparams),
    ):
        changed = [name for name, value in now.items() if saved[part].get(name) != value]
        if changed:
            raise UsageError(
                f"{path} was made with another {changed[0]} ({saved[part].get(changed[0])}, "
                f"now {now[changed[0]]}): choose another --name, or delete it to start anew"
            )


def sample(
    checkpoint: Path,
    prompt: str = "",
    count: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    attention: str = "flash",
) -> str:
    """Continue a prompt with a trained GPT.

    Args:
        checkpoint: file that ``fit`` made.
        prompt: text to continue, at most as long as the model's context. An empty one begins a
            document; the text ``<|endofdocument|>`` is the characters it is made of.
        count: tokens to add.
        temperature: lower is more predictable.
        top_k: choose among this many most likely tokens.
        seed: of the choice.
        attention: any of the model's attentions; they compute the same.

    Returns:
        The prompt and its continuation. Bytes that are no UTF-8, such as a character that the last
        token has cut, are U+FFFD.
    """
    if count < 1 or temperature <= 0 or top_k < 1:
        raise UsageError("count and top_k must be at least 1 and temperature above 0")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # an argument whose bytes are not UTF-8
        raise UsageError(
            f"the prompt must be UTF-8 text, and is none at character {error.start}"
        ) from error
    saved = read_checkpoint(checkpoint)
    try:
        shape: GPTConfig = replace(saved["hyper_parameters"]["gpt"], attention=attention)
        tokenizer = literal(Tokenizer.from_str(saved["TextData"]["tokenizer"]))
        module = GPTModule(**(saved["hyper_parameters"] | {"gpt": shape}))
        module.load_state_dict(saved["state_dict"])
    except UsageError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise BadCheckpoint(f"{checkpoint} does not hold what a GPT needs: {error}") from error
    model = module.model.eval()
    ids = tokenizer.encode(prompt).ids or [tokenizer.token_to_id(END_OF_DOCUMENT)]
    if len(ids) > shape.context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens and the model's context is {shape.context}"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = model.generate(
        torch.tensor([ids]), count, temperature=temperature, top_k=top_k, generator=generator
    )
    return tokenizer.decode(tokens[0].tolist())
