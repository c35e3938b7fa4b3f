"""The GPT as a LightningModule: loss, optimiser, schedule."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from train.model import GPT, GPTConfig
from train.running.parallel import Parallel, SequenceShard, own_rows

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
        checkpoint_activations: bool = False,
        compile: bool = False,
    ) -> None:
        """Build the model.

        Args:
            gpt: its shape and its attention.
            learning_rate: the highest one, reached after the warm-up.
            warmup_steps: steps of linear warm-up.
            weight_decay: of matrices; biases and norms have none.
            betas: of AdamW.
            checkpoint_activations: keep only what goes into each block, and compute the block
                again in the backward pass.
            compile: run the blocks through torch.compile.
        """
        super().__init__()
        # Not hyperparameters: a checkpoint can be resumed with either setting.
        self.save_hyperparameters(ignore=["checkpoint_activations", "compile"])
        self.parallel = Parallel()  # how the run is spread over processes
        self.grid: DeviceMesh | None = None
        self.model = GPT(gpt)
        self.model.recompute_blocks = checkpoint_activations
        if compile:
            # Blocks are alike: compiled one by one they compile once, and FSDP gathers the weights
            # of one at a time.
            for block in self.model.blocks:
                block.compile()

    def configure_model(self) -> None:
        """Shard or replicate the model; called once the process group exists."""
        if self.parallel.ranks == 1 or self.grid is not None:
            return
        self.grid = self.parallel.grid(self.trainer.strategy.root_device)
        if self.parallel.context > 1:
            self.model.shard_sequences(
                SequenceShard(
                    self.grid.get_group("context"), self.parallel.attention, self.parallel.placement
                )
            )
        if self.parallel.shard:
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of one batch ``{"tokens": (B, context + 1)}``, of which the ranks share the rows."""
        loss = self.model.loss(own_rows(batch["tokens"], self.grid))
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Log the held-out loss, averaged over all blocks."""
        self.log(
            "val_loss",
            self.model.loss(own_rows(batch["tokens"], self.grid)),
            prog_bar=True,
            batch_size=len(batch["tokens"]),
            sync_dist=True,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm as it is before clipping."""
        gradients = [
            parameter.grad for parameter in self.parameters() if parameter.grad is not None
        ]
        self.log("grad_norm", whole(torch.nn.utils.get_total_norm(gradients)))

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Number the optimizer's parameters as the model has them, which FSDP goes by.

        PyTorch numbers them by group. It reads either numbering, and FSDP would take one
        parameter's state for another's.
        """
        if self.parallel.shard:
            return
        numbers = {id(parameter): number for number, parameter in enumerate(self.parameters())}
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        in_groups = [numbers[id(p)] for group in optimizer.param_groups for p in group["params"]]
        (saved,) = checkpoint["optimizer_states"]
        saved["state"] = {in_groups[number]: state for number, state in saved["state"].items()}
        for group in saved["param_groups"]:
            group["params"] = [in_groups[number] for number in group["params"]]

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


def whole(x: Tensor) -> Tensor:
    """A tensor that may be sharded by FSDP, whole on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x
