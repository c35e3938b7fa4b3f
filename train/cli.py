"""``python -m train {parity,fit,sample}``: what each does, and how mistakes are told."""

import shlex
import signal
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer

from train import UsageError
from train.config import RUNS, build, check, quiet, training_parser
from train.data import END_OF_DOCUMENT, TextData
from train.insight import Insight, InsightOptions, loggers
from train.lit import GPTModule
from train.model import GPTConfig
from train.parity import ParityOptions, run_parity
from train.progress import progress


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 done, 1 the verdict is fail, 2 a mistake in the request, 130 Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    quiet()
    try:
        config = make_parser().parse_args(arguments)
        command = config.subcommand
        if command == "sample":
            print(sample(**config.sample.as_dict()))
        elif command == "fit":
            fit(config.fit)
        else:
            summary = run_parity(config.parity, shlex.join(["python", "-m", "train", *arguments]))
            return 0 if summary["verdict"] == "pass" else 1
    except (ArgumentError, UsageError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


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
    fitting = fit_parser()
    sampling = ArgumentParser(
        description="Continue a prompt with a trained GPT.", exit_on_error=False
    )
    sampling.add_function_arguments(sample)
    commands.add_subcommand(
        "parity", parity, help="train with several attentions and judge whether they agree"
    )
    commands.add_subcommand("fit", fitting, help="train one GPT, with checkpoints")
    commands.add_subcommand("sample", sampling, help="continue a prompt with a trained GPT")
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
        "Train one GPT; run the same command again to go on from its last checkpoint."
    )
    parser.add_argument("--insight", type=InsightOptions, default=InsightOptions())
    return parser


class StopAtCtrlC(L.Callback):
    """Lets Ctrl-C end training between two steps: inside one, an update could be half made."""

    asked = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take Ctrl-C over; a second one stops at once."""

        def stop(*_: Any) -> None:
            self.asked = trainer.should_stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, stop)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give Ctrl-C back."""
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fit(config: Namespace) -> None:
    """Train one GPT into ``runs/<name>/checkpoints/``, from ``last.ckpt`` on if there is one.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is saved.
    """
    check(config)
    insight = Insight(InsightOptions(**config.insight.as_dict()))
    folder = RUNS / config.name / "checkpoints"
    last = folder / "last.ckpt"
    stop = StopAtCtrlC()
    best = ModelCheckpoint(
        folder, filename="best", monitor="val_loss", save_last=True, enable_version_counter=False
    )
    trainer, module, data = build(
        config,
        callbacks=[best, stop, insight, *progress(config.name)],
        logger=loggers(config.name),
        enable_model_summary=False,
    )
    if last.exists():
        _require_same_run(last, module, data)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(last)
    if stop.asked:
        print(f"stopped at step {trainer.global_step}: the same command goes on from {last}")
        raise KeyboardInterrupt
    print(f"trained {trainer.global_step} steps: {last}")


def _require_same_run(checkpoint: Path, module: GPTModule, data: TextData) -> None:
    """Refuse to go on with other options than the checkpoint's: that run would be neither."""
    saved = _load_checkpoint(checkpoint)
    for part, now in (
        ("hyper_parameters", module.hparams),
        ("datamodule_hyper_parameters", data.hparams),
    ):
        changed = [name for name, value in now.items() if saved[part].get(name) != value]
        if changed:
            raise UsageError(
                f"{checkpoint} was made with another {changed[0]} ({saved[part].get(changed[0])}, "
                f"now {now[changed[0]]}): choose another --name, or delete it to start anew"
            )


def _load_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is not a checkpoint, or not a whole one")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if "TextData" not in loaded:
        raise UsageError(f"{path} is not a checkpoint of python -m train fit")
    return loaded


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
        prompt: text to continue, at most as long as the model's context.
        count: tokens to add.
        temperature: lower is more predictable.
        top_k: choose among this many most likely tokens.
        seed: of the choice.
        attention: any of the model's attentions; they compute the same.

    Returns:
        The prompt and its continuation.
    """
    if count < 1 or temperature <= 0 or top_k < 1:
        raise UsageError("count and top_k must be at least 1 and temperature above 0")
    saved = _load_checkpoint(checkpoint)
    shape: GPTConfig = replace(saved["hyper_parameters"]["gpt"], attention=attention)
    tokenizer = Tokenizer.from_str(saved["TextData"]["tokenizer"])
    ids = tokenizer.encode(prompt).ids or [tokenizer.token_to_id(END_OF_DOCUMENT)]
    if len(ids) > shape.context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens and the model's context is {shape.context}"
        )
    model = GPTModule.load_from_checkpoint(checkpoint, map_location="cpu", gpt=shape).model.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = model.generate(
        torch.tensor([ids]), count, temperature=temperature, top_k=top_k, generator=generator
    )
    return tokenizer.decode(tokens[0].tolist())
