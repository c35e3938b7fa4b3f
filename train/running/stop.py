"""What ends a run before its last step: a signal, or a NaN or infinite number."""

import itertools
import math
import signal
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train import RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the run to stop; like KeyboardInterrupt not an Exception.

    Attributes:
        signal: its number.
        at_once: whether it came twice.
    """

    def __init__(self, signum: int, at_once: bool) -> None:
        """Keep what a shell would say of the signal; a pickle of it is what it was."""
        super().__init__(signum, at_once)
        self.signal, self.at_once = signal.Signals(signum), at_once


class StopAtSignal(L.Callback):
    """Lets Ctrl-C or SIGTERM end training between two steps, when no update is half made.

    A context manager around ``fit``, and a callback in it that raises :class:`Stopped` on every
    rank at the same step, whichever of them got the signal. A second signal stops at once.
    """

    asked: int | None = None

    def __enter__(self) -> None:
        """Install the signal handlers."""
        self.before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._take_over()

    def __exit__(self, *_: Any) -> None:
        """Restore the handlers."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install them again over Lightning's.

        Among several processes its handler communicates, perhaps inside another communication.
        """
        self._take_over()

    on_train_start = on_sanity_check_start

    def _take_over(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, self._note)

    def _note(self, signum: int, _: Any) -> None:
        if self.asked is not None:
            raise Stopped(signum, at_once=True)
        self.asked = signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if any rank was asked to."""
        asked = torch.tensor(self.asked or 0, device=pl_module.device)
        asked = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if asked:
            raise Stopped(asked, at_once=False)


class StopAtNonFinite(L.Callback):
    """Ends a run whose loss or gradient is NaN or infinite before the update that would spread it.

    The loss and the largest entry of every gradient are gathered in one vector on the device, and
    the vector of the first bad step stays there until it is read. On the CPU it is read at every
    step, so that a bad update is never made. On a GPU reading waits for the backward pass, so it
    happens every ``every`` steps, best where the logger waits anyway, and before a checkpoint is
    written. Only then the module that caused it is searched for.
    """

    def __init__(self, every: int) -> None:
        """Read the numbers every ``every`` steps on a GPU."""
        self.every = every

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the state."""
        if pl_module.device.type == "cpu":
            self.every = 1
        self.names: list[str] = []
        self.batches: list[Any] = []
        self.losses: list[Tensor] = []
        self.first_bad: Tensor | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batches of this step; the search runs them again."""
        self.batches.append(batch)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss."""
        self.losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gather this step's numbers, and read them if it is time."""
        # With fp16's scaler an infinite gradient is a normal event: it skips the step.
        gradients = _local_gradients(pl_module) if getattr(trainer, "scaler", None) is None else {}
        self.names = list(gradients)
        loss = torch.stack(self.losses).sum().float()
        # One launch for all, as in torch's own clip_grad_norm_.
        largest = torch._foreach_norm(  # pyright: ignore[reportPrivateImportUsage]
            list(gradients.values()), torch.inf
        )
        numbers = torch.stack([loss, *(norm.float() for norm in largest)])
        if self.first_bad is None:
            self.first_bad = numbers
            self.finite_steps, self.looked_at = torch.zeros_like(loss), trainer.global_step
        else:
            self.first_bad = torch.where(self.first_bad.isfinite().all(), numbers, self.first_bad)
        self.finite_steps += self.first_bad.isfinite().all()
        if (trainer.global_step + 1) % self.every == 0:
            self.look(trainer, pl_module)
        self.batches, self.losses = [], []

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what was gathered since the last look; called on every rank.

        Raises:
            RunError: something in it is not finite on one of them.
        """
        if self.first_bad is None:
            return
        loss, *largest = self.first_bad.tolist()
        step = self.looked_at + int(self.finite_steps.item()) + 1
        self.first_bad = None
        fine = all(math.isfinite(number) for number in (loss, *largest))
        if trainer.strategy.reduce_boolean_decision(fine):
            return
        bad = {
            name
            for name, number in zip(self.names, largest, strict=True)
            if not math.isfinite(number)
        }
        # After an update with a NaN every weight is NaN: a forward pass would not find the cause.
        batches = self.batches if step == trainer.global_step + 1 else []
        raise RunError(_diagnosis(trainer, pl_module, step, loss, bad, batches))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the numbers first: no bad state may replace a good checkpoint."""
        self.look(trainer, pl_module)
        weights = checkpoint["state_dict"]  # empty where other ranks hold all of it
        finite = torch.tensor([bool(weight.isfinite().all()) for weight in weights.values()])
        if not trainer.strategy.reduce_boolean_decision(bool(finite.all())):
            bad = [name for name, fine in zip(weights, finite, strict=True) if not fine]
            first = f"{_module_of(bad[0])} has" if bad else "another rank has"
            raise RunError(f"after step {trainer.global_step} {first} weights that are not finite")


def _local_gradients(module: nn.Module) -> dict[str, Tensor]:
    """This rank's shard of every gradient, in forward order."""
    gradients = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    local = {
        name: grad.to_local() if isinstance(grad, DTensor) else grad
        for name, grad in gradients.items()
    }
    return {name: grad for name, grad in local.items() if grad.numel()}


def _diagnosis(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    step: int,
    loss: float,
    bad: set[str],
    batches: list[Any],
) -> str:
    """One sentence, on every rank the same: what is not finite, when, and where it came from."""
    clues = (step, loss, bad, _first_in_forward_pass(trainer, pl_module, batches))
    ranks: list[Any] = [clues]
    if trainer.world_size > 1:
        ranks = [None] * trainer.world_size
        dist.all_gather_object(ranks, clues)
    steps, losses, gradients, outputs = zip(*ranks, strict=True)
    bad_losses = [loss for loss in losses if not math.isfinite(loss)]
    what = f"loss is {bad_losses[0]}" if bad_losses else "gradient is not finite"
    told = []
    # A parameter's place in the module is its place in the forward pass.
    bad = set().union(*gradients)
    modules = [_module_of(name) for name, _ in pl_module.named_parameters() if name in bad]
    if modules:
        told.append(f"the first module with a non-finite gradient is {modules[0]}")
        if modules[-1] != modules[0]:
            told.append(f"the backward pass, from the last to the first, began with {modules[-1]}")
    outputs = [first for first in outputs if first is not None]
    if outputs:
        told.append(f"in the forward pass {min(outputs)[1]}")
    return f"the {what} at step {min(steps)}: {'; '.join(told)}"


def _first_in_forward_pass(
    trainer: L.Trainer, pl_module: L.LightningModule, batches: list[Any]
) -> tuple[int, str] | None:
    """Which module is the first with weights or an output that are not finite, of ``batches``.

    Returns:
        Its place in the order of execution, and what of it is not finite.
    """
    found: list[tuple[int, str]] = []
    calls = itertools.count()

    def check(name: str, module: nn.Module, _: Any, output: Any) -> None:
        place = next(calls)
        if not all(parameter.isfinite().all() for parameter in module.parameters(recurse=False)):
            found.append((place, f"{name} is the first with weights that are not finite"))
        elif isinstance(output, Tensor) and not output.isfinite().all():
            found.append((place, f"{name} is the first with an output that is not finite"))

    hooks = [
        module.register_forward_hook(partial(check, name))
        for name, module in pl_module.named_modules()
    ]
    context = trainer.precision_plugin.train_step_context()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), context:
        for batch in batches:
            pl_module.training_step(batch)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]
