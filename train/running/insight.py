"""What a training run logs: speed, memory, learning rate, and attention statistics on request."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from flashlayer import AuxRequest, flash_attention
from train import UsageError
from train.lit import GPTModule
from train.measure import PeakMemory, Yardstick, synchronize
from train.model import GPT, CausalSelfAttention
from train.running.parallel import own_rows

MATMULS = 10  # of which the fastest is the device's peak
NUMBERS = AuxRequest(max_scores=True, entropy=True)


@dataclass
class InsightOptions:
    """What a run logs besides its losses, speed and memory.

    Attributes:
        attention: log the entropy and the largest logit of every layer's attention.
        every: steps from one measurement of the attention to the next.
    """

    attention: bool = False
    every: int = 50

    def __post_init__(self) -> None:
        """Refuse values below 1."""
        if self.every < 1:
            raise UsageError(f"insight.every must be at least 1, not {self.every}")


def boards(folder: Path, step: int) -> list[Logger]:
    """TensorBoard's logger, where it is installed, in the run's ``folder`` under ``tensorboard``.

    TensorBoard drops what was logged past ``step``, where the run resumes.
    """
    if find_spec("tensorboard") is None:
        return []
    return [
        TensorBoardLogger(
            folder.parent,
            name=folder.name,
            version="tensorboard",
            default_hp_metric=False,
            purge_step=step,
        )
    ]


class Insight(L.Callback):
    """Logs how training goes, at the trainer's logging steps and of all ranks together.

    * ``tokens_per_second`` since the last of them, what lies between batches included and
      validation left out;
    * ``mfu``, the model FLOPs of these tokens (:func:`flops_per_token`) over what the devices could
      have done meanwhile at the speed of a large matrix product, which is measured once, here;
    * ``peak_memory_bytes``, the highest since the start, of the rank that has the most;
    * ``learning_rate``, the one that the step's update was made with.

    And every so many steps, if asked to, how each layer attends to the step's batch:
    ``attention_entropy/layer_<i>``, mean over the queries, in nats, and ``max_logit/layer_<i>``.

    Nothing it does touches the weights, the gradients or a random number that training uses.
    """

    def __init__(self, options: InsightOptions) -> None:
        """Keep the options; measuring starts with training."""
        self.options = options
        self.tokens = self.step = 0
        self.start = self.pause = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: GPTModule) -> None:
        """Measure what the device can do, and start the clock."""
        yardstick = Yardstick(pl_module.device, _compute_dtype(trainer, pl_module))
        for _ in range(MATMULS):
            yardstick.sample()
        self.peak_flops = yardstick.peak() * trainer.world_size
        self.flops_per_token = flops_per_token(pl_module.model)
        self.memory = PeakMemory(pl_module.device)
        self.tokens, self.step = 0, trainer.global_step
        self.start = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: GPTModule) -> None:
        """Stop the clock."""
        self._pause(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: GPTModule) -> None:
        """Restart the clock."""
        self._resume(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: GPTModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the learning rate of this step, before the schedule is advanced."""
        pl_module.log("learning_rate", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GPTModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch's tokens; at the end of a step, log what is due."""
        self.tokens += batch["tokens"][:, 1:].numel()  # of all ranks: they share the batch out
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and self.step % every == 0:
            self._log_speed(pl_module)
        if self.options.attention and self.step % self.options.every == 0:
            self._pause(pl_module.device)
            self._log_attention(trainer, pl_module, batch["tokens"][:, :-1])
            self._resume(pl_module.device)

    def _log_speed(self, module: GPTModule) -> None:
        synchronize(module.device)
        now = time.perf_counter()
        speed = self.tokens / (now - self.start)
        self.tokens, self.start = 0, now
        module.log("tokens_per_second", speed)
        module.log("mfu", speed * self.flops_per_token / self.peak_flops)
        peak = float(self.memory.peak())
        module.log("peak_memory_bytes", peak, sync_dist=True, reduce_fx="max")

    def _log_attention(self, trainer: L.Trainer, module: GPTModule, tokens: Tensor) -> None:
        tokens = module.model.part(own_rows(tokens, module.grid))
        precision = trainer.precision_plugin.forward_context()
        with torch.no_grad(), precision, watched(module.model) as layers:
            module.model(tokens)
        metrics = {}
        for layer, (entropy, logit) in enumerate(layers):
            for name, value, op in (
                ("attention_entropy", entropy.mean(), "mean"),
                ("max_logit", logit.max(), "max"),
            ):
                metrics[f"{name}/layer_{layer}"] = trainer.strategy.reduce(value, reduce_op=op)
        for logger in trainer.loggers:
            # As Lightning counts, from 0.
            logger.log_metrics({k: v.item() for k, v in metrics.items()}, step=self.step - 1)

    def _pause(self, device: torch.device) -> None:
        synchronize(device)
        self.pause = time.perf_counter()

    def _resume(self, device: torch.device) -> None:
        synchronize(device)
        self.start += time.perf_counter() - self.pause


def _compute_dtype(trainer: L.Trainer, module: GPTModule) -> torch.dtype:
    """The dtype of the model's matrix products, read from the result of one."""
    some = torch.zeros(1, 1, device=module.device, dtype=next(module.parameters()).dtype)
    with trainer.precision_plugin.forward_context():
        return torch.mm(some, some).dtype


def flops_per_token(model: GPT) -> int:
    """Model FLOPs of one training step per token, at sequences of the whole context.

    A parameter in a matrix takes part in one multiply-add forward and two backward, 6 FLOPs; the
    position embedding takes part in none, the token embedding does as the head. A query of a causal
    sequence of T positions sees (T + 1) / 2 keys on average, and each costs a multiply-add with its
    key and one with its value in every channel, twice as much backward: 12 FLOPs. So

        6 * parameters + 6 * n_layer * n_embd * (T + 1)

    What is computed again in the backward pass is no model FLOP: not the scores of flash attention,
    nor what activation checkpointing repeats.

    Source: Chowdhery et al., "PaLM" (arXiv 2204.02311), appendix B, which counts the attention as
        if it were not causal; nanoGPT's ``estimate_mfu``.
    """
    shape = model.config
    parameters = sum(p.numel() for p in model.parameters()) - model.positions.weight.numel()
    return 6 * parameters + 6 * shape.n_layer * shape.n_embd * (shape.context + 1)


@contextmanager
def watched(model: GPT) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Append the entropy and the largest logit of every layer's queries to a list, in the block.

    Both are ``(B, H, S)`` and come from the call that computes the layer's output.
    """
    found: list[tuple[Tensor, Tensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, CausalSelfAttention)]
    originals = [layer.attend for layer in layers]
    attend: Callable[..., Any] = flash_attention if model.shard is None else model.shard.attend

    def watching(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, numbers = attend(q, k, v, causal=True, return_aux=NUMBERS)
        found.append((numbers.entropy, numbers.max_scores))
        return out

    for layer in layers:
        layer.attend = watching
    try:
        # Else a compiled model would be compiled again for these few steps.
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.attend = original
