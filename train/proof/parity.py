"""The training proof: the same GPT, weights and batches with several attentions.

Rounding alone makes two correct attentions differ a little, and training amplifies it. So the gap
between ``flash`` and ``standard`` is read against the gap between ``control`` and ``standard``,
where ``control`` is standard attention with its sums in another order. Every arm trains in a fresh
process, which makes its peak memory its own.
"""

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from torch import Tensor

from train import RunError, UsageError
from train.config import RUNS, as_parallel, build, check, check_parallel
from train.lit import GPTModule, whole
from train.measure import (
    PeakMemory,
    in_fresh_process,
    interleaved,
    synchronize,
)
from train.model import GPTConfig
from train.proof import report
from train.proof.layer import LayerStudy, layer_memory, layer_seconds
from train.proof.verdict import CANDIDATE, CONTROL, REFERENCE, ArmRun, Rule, gap, judge
from train.running.parallel import Parallel
from train.running.ranks import in_ranks

# Trainer options of every arm; they override the configuration.
ARM_OPTIONS: dict[str, Any] = {
    "num_sanity_val_steps": -1,
    "logger": False,
    "enable_checkpointing": False,
}
WARM_UP_STEPS = 5  # not counted in an arm's tokens per second
LAYER_DTYPES = {
    "bf16": torch.bfloat16,
    "16": torch.float16,
    "32": torch.float32,
    "64": torch.float64,
}  # by the prefix of Lightning's precision names


@dataclass
class ParityOptions:
    """What is compared, and how it is judged.

    Attributes:
        arms: which attention each arm trains with; ``standard``, ``flash`` and ``control`` must be
            among them.
        rule: the verdict's thresholds.
        speed_rounds: training steps per arm, taken in turns, behind the ratio of their speeds.
        layer: the study of one attention layer alone.
        layouts: arms that train on several processes, and how they are spread. They are judged as
            ``flash`` is.
        note: a sentence for the top of the report.
    """

    arms: dict[str, str] = field(
        default_factory=lambda: {arm: arm for arm in (REFERENCE, CANDIDATE, CONTROL)}
    )
    rule: Rule = field(default_factory=Rule)
    speed_rounds: int = 15
    layer: LayerStudy = field(default_factory=LayerStudy)
    layouts: dict[str, Parallel] = field(default_factory=dict)
    note: str | None = None


class Recorder(L.Callback):
    """Collects what :class:`ArmRun` holds while Lightning trains."""

    def __init__(self, arm: str) -> None:
        """Record under the name ``arm``."""
        self.arm = arm
        self.rows: list[dict[str, Any]] = []
        self.batches: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: GPTModule) -> None:
        """Record weights and memory: the model is on its device, and no update has been made."""
        self.weights = _digest(pl_module.parameters())
        self.memory = PeakMemory(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: GPTModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.batches.append(_digest([batch["tokens"]]))
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GPTModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a row; its loss was computed before the step's update, its validation comes after."""
        synchronize(pl_module.device)
        seconds = time.perf_counter() - self.start
        self.rows.append(
            {
                "arm": self.arm,
                "step": trainer.global_step,
                "train_loss": trainer.callback_metrics["train_loss"].item(),
                "val_loss": None,
                "grad_norm": trainer.callback_metrics["grad_norm"].item(),
                "tokens_per_second": batch["tokens"][:, 1:].numel() / seconds,
                "peak_memory_bytes": self.memory.peak(),
            }
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: GPTModule) -> None:
        """Lightning's sanity check, before training, is the validation at step 0."""
        loss = trainer.callback_metrics["val_loss"].item()
        if trainer.sanity_checking:
            self.initial_val_loss = loss
        else:
            self.rows[-1]["val_loss"] = loss


def _digest(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of the tensors' bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        # Copy: FSDP can't free memory that a numpy array refers to.
        copy = whole(tensor.detach()).cpu().clone(memory_format=torch.contiguous_format)
        numbers = copy.view(torch.uint8).numpy()
        digest.update(numbers.data)
    return digest.hexdigest()


def train_arm(config: Namespace, arm: str) -> ArmRun:
    """Train one arm from its first step to its last."""
    begin = time.perf_counter()
    recorder = Recorder(arm)
    trainer, module, data = build(
        _of_arm(config, arm),
        callbacks=[recorder],
        label=arm,
        **ARM_OPTIONS,
    )
    trainer.fit(module, data)
    if len(recorder.rows) < config.trainer.max_steps:
        raise RunError(
            f"a callback ended the arm {arm} after {len(recorder.rows)} of "
            f"{config.trainer.max_steps} steps: arms are compared step by step"
        )
    if recorder.rows[-1]["val_loss"] is None:  # the last step fell between two validations
        trainer.validate(module, data, verbose=False)
    return ArmRun(
        rows=recorder.rows,
        initial_val_loss=recorder.initial_val_loss,
        weights=recorder.weights,
        batches=recorder.batches,
        extra_memory_bytes=recorder.memory.extra(),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        seconds=time.perf_counter() - begin,
    )


def step_seconds(config: Namespace) -> dict[str, float]:
    """Median seconds of one training step per arm, all arms in one process and in turns.

    Arms that train one after the other meet a machine that is busier at one time than at another;
    turns make the ratio of their speeds fair.
    """
    fabric = L.Fabric(
        accelerator=config.trainer.accelerator, devices=1, precision=config.trainer.precision
    )
    steps = {}
    for arm in config.parity.arms:
        if arm in config.parity.layouts:
            continue
        _, module, data = build(_of_arm(config, arm), callbacks=[], logger=False)
        data.setup()
        model, optimizer = fabric.setup(
            module.model, torch.optim.AdamW(module.parameter_groups(), lr=1e-4)
        )
        model.mark_forward_method("loss")
        rows = [block % len(data.train_blocks) for block in range(config.data.batch_size)]
        tokens = fabric.to_device(data.train_blocks[rows]["tokens"])
        steps[arm] = _training_step(fabric, model, optimizer, tokens)
    return interleaved(steps, config.parity.speed_rounds)


def _training_step(
    fabric: L.Fabric, model: Any, optimizer: Any, tokens: Tensor
) -> Callable[[], None]:
    def step() -> None:
        fabric.backward(model.loss(tokens))
        optimizer.step()
        optimizer.zero_grad()
        synchronize(fabric.device)

    return step


def run_parity(config: Namespace, command: str, *, isolate: bool = True) -> dict[str, Any]:
    """Train the arms, measure speed and memory, judge, and write ``runs/<name>/``.

    Args:
        config: what the parser of ``python -m train parity`` returned.
        command: how to run this again, for the report.
        isolate: a fresh process for every arm and measurement; else all of them in this one.

    Returns:
        The contents of summary.json.

    Raises:
        UsageError: the configuration can't be run; nothing has been written.
    """
    _check(config)
    options, call = config.parity, in_fresh_process if isolate else _call
    rule = Rule(**options.rule.as_dict())
    device, dtype = _layer_device(config)
    environment = report.environment(device)
    print(
        f"{config.name}: {config.trainer.max_steps} steps per arm on {environment['device']}",
        flush=True,
    )

    runs, arms = {}, {}
    for arm, attention in options.arms.items():
        if arm in options.layouts:
            ranks = as_parallel(options.layouts[arm]).ranks
            runs[arm] = in_ranks(ranks, train_arm, config, arm)
        else:
            runs[arm] = call(train_arm, config, arm)
        arms[arm] = {"attention": attention, **_arm_summary(runs[arm])}
        print(report.arm_line(arm, arms[arm]), flush=True)

    seconds = call(step_seconds, config)
    layer = LayerStudy(**options.layer.as_dict())
    lengths = []
    for length in layer.lengths:
        lengths.append(_layer_row(layer, options.arms, length, device, dtype, call))
        print(report.layer_line(lengths[-1]), flush=True)

    checks = judge(runs, rule, [CANDIDATE, *options.layouts])
    gaps = {arm: gap(run, runs[REFERENCE]) for arm, run in runs.items() if arm != REFERENCE}
    summary = {
        "name": config.name,
        "verdict": "pass" if all(check["passed"] for check in checks) else "fail",
        "rule": str(rule),
        "checks": checks,
        "arms": arms,
        "layouts": {arm: layout.as_dict() for arm, layout in options.layouts.items()},
        "flash_gap": gaps[CANDIDATE],
        "control_gap": gaps[CONTROL],
        "gaps": gaps,
        "loss_bound": rule.loss_bound(gaps[CONTROL]["max"]),
        "speed": {
            "step_seconds": seconds,
            "flash_over_standard": seconds[REFERENCE] / seconds[CANDIDATE],
            "rounds": options.speed_rounds,
        },
        "layer": {**asdict(layer), "dtype": str(dtype).removeprefix("torch."), "lengths": lengths},
        "run": _run_summary(config, runs[REFERENCE]),
        "environment": environment,
        "note": options.note,
        "command": command,
    }
    folder = RUNS / config.name
    report.write(folder, summary, runs)
    print(report.closing_lines(summary, folder), flush=True)
    return summary


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _check(config: Namespace) -> None:
    """Refuse what can't be run before the first arm is trained."""
    arms = config.parity.arms
    missing = [arm for arm in (REFERENCE, CANDIDATE, CONTROL) if arm not in arms]
    if missing:
        raise UsageError(
            f"parity.arms lacks {', '.join(missing)}: the verdict compares flash and control with "
            "standard"
        )
    for attention in arms.values():
        GPTConfig(**config.model.gpt.as_dict() | {"attention": attention})
    if as_parallel(config.parallel).ranks > 1:
        raise UsageError("parallel must be left alone: parity.layouts spreads arms over processes")
    for arm in config.parity.layouts:
        if arm not in arms or arm in (REFERENCE, CANDIDATE, CONTROL):
            raise UsageError(
                f"parity.layouts.{arm} must be an arm of parity.arms besides {REFERENCE}, "
                f"{CANDIDATE} and {CONTROL}, which train on one process"
            )
        try:
            check_parallel(_of_arm(config, arm))
        except UsageError as error:
            raise UsageError(f"parity.layouts.{arm}: {error}") from error
    if (
        config.parity.speed_rounds < 1
        or config.parity.layer.rounds < 1
        or not config.parity.layer.lengths
    ):
        raise UsageError(
            "parity.speed_rounds and parity.layer.rounds must be at least 1, and layer.lengths "
            "not empty"
        )
    if _bits(config) not in LAYER_DTYPES:
        raise UsageError(
            "trainer.precision must be 32-true, bf16-mixed or alike, "
            f"not {config.trainer.precision}"
        )
    check(config, "parity", **ARM_OPTIONS)


def _of_arm(config: Namespace, arm: str) -> Namespace:
    changed = config.clone()
    changed.model.gpt.attention = config.parity.arms[arm]
    if arm in config.parity.layouts:
        changed.parallel = config.parity.layouts[arm]
    return changed


def _layer_device(config: Namespace) -> tuple[torch.device, torch.dtype]:
    """Where and in which precision the arms train."""
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu"), LAYER_DTYPES[_bits(config)]


def _bits(config: Namespace) -> str:
    return str(config.trainer.precision or "32-true").partition("-")[0]


def _layer_row(
    layer: LayerStudy,
    arms: dict[str, str],
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    call: Callable[..., Any],
) -> dict[str, Any]:
    """Seconds and extra bytes of flash and standard at one length; each in a process of its own."""
    attentions = {arm: arms[arm] for arm in (REFERENCE, CANDIDATE)}
    return {
        "length": length,
        "seconds": call(layer_seconds, layer, attentions, length, device, dtype),
        "extra_bytes": {
            arm: call(layer_memory, layer, attention, length, device, dtype)
            for arm, attention in attentions.items()
        },
    }


def _arm_summary(run: ArmRun) -> dict[str, Any]:
    speeds = run.column("tokens_per_second")
    return {
        "final_train_loss": run.rows[-1]["train_loss"],
        "initial_val_loss": run.initial_val_loss,
        "final_val_loss": run.rows[-1]["val_loss"],
        "val_loss_fall": run.val_loss_fall(),
        "tokens_per_second": statistics.median(
            speeds[WARM_UP_STEPS:] if len(speeds) > WARM_UP_STEPS else speeds
        ),
        "peak_memory_bytes": run.rows[-1]["peak_memory_bytes"],
        "extra_memory_bytes": run.extra_memory_bytes,
        "seconds": run.seconds,
    }


def _run_summary(config: Namespace, run: ArmRun) -> dict[str, Any]:
    """A summary of the training setup."""
    return {
        **{
            name: value for name, value in config.model.gpt.as_dict().items() if name != "attention"
        },
        "parameters": run.parameters,
        "corpus": config.data.corpus,
        "tokenizer": config.data.tokenizer,
        "batch_size": config.data.batch_size,
        "steps": len(run.rows),
        "precision": str(config.trainer.precision or "32-true"),
        "seed": config.seed,
    }
