"""The GPT as a LightningModule: loss, optimiser, schedule."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from train.model import GPT, GPTConfig

# A checkpoint carries the model's shape; this lets torch.load read it back without trusting the
# file any further.
torch.serialization.add_safe_globals([GPTConfig])


class GPTModule(L.LightningModule):
    """A GPT with AdamW, linear warm-up and cosine decay to a tenth of the learning rate."""

    def __init__(
        self,
        gpt: GPTConfig,
        learning_rate: float = 1e-3,
        warmup_steps: int = 20,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        """Build the model.

        Args:
            gpt: its shape and its attention.
            learning_rate: the highest one, reached after the warm-up.
            warmup_steps: steps of linear warm-up.
            weight_decay: of matrices; biases and norms have none.
            betas: of AdamW.
        """
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT(gpt)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of one batch ``{"tokens": (B, context + 1)}``."""
        loss = self.model.loss(batch["tokens"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Log the held-out loss, averaged over all blocks."""
        self.log(
            "val_loss",
            self.model.loss(batch["tokens"]),
            prog_bar=True,
            batch_size=len(batch["tokens"]),
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm as it is before clipping."""
        gradients = [
            parameter.grad for parameter in self.parameters() if parameter.grad is not None
        ]
        self.log("grad_norm", torch.nn.utils.get_total_norm(gradients))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices, which decay, and vectors (biases and norms), which don't."""
        parameters = list(self.parameters())
        return [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": self.hparams["weight_decay"],
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, and the schedule stepped once per update."""
        total = self.trainer.max_steps
        optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=self.hparams["learning_rate"], betas=self.hparams["betas"]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: schedule_factor(step, self.hparams["warmup_steps"], total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def schedule_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Fraction of the learning rate: linear up over the warm-up, then a cosine down to 0.1."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))
