"""Time and memory of one attention layer at growing lengths."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from train.measure import PeakMemory, interleaved, synchronize
from train.model import ATTENTIONS

# Long enough to start threads and load kernels, too short to leave freed memory behind for the
# measured run.
WARM_UP_LENGTH = 16


@dataclass
class LayerStudy:
    """One causal attention layer, forward + backward, at growing lengths.

    Attributes:
        lengths: sequence lengths.
        batch: batch size.
        heads: attention heads.
        head_dim: their width.
        rounds: how often each is timed; the arms take turns, and the median counts.
    """

    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    rounds: int = 7

    def step(
        self, attention: str, length: int, device: torch.device, dtype: torch.dtype
    ) -> Callable[[], None]:
        """A function that runs the layer once, forward and backward."""
        generator = torch.Generator().manual_seed(length)

        def draw() -> Tensor:
            shape = (self.batch, self.heads, length, self.head_dim)
            return torch.randn(shape, generator=generator).to(device, dtype)

        q, k, v = (draw().requires_grad_() for _ in range(3))
        do = draw()

        def run() -> None:
            torch.autograd.grad(ATTENTIONS[attention](q, k, v), (q, k, v), do)
            synchronize(device)

        return run


def layer_memory(
    study: LayerStudy, attention: str, length: int, device: torch.device, dtype: torch.dtype
) -> int:
    """Bytes that one forward + backward needs beyond its inputs; call it in a fresh process."""
    study.step(attention, WARM_UP_LENGTH, device, dtype)()
    run = study.step(attention, length, device, dtype)
    memory = PeakMemory(device)
    run()
    return memory.extra()


def layer_seconds(
    study: LayerStudy, arms: dict[str, str], length: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Median seconds of one forward + backward per arm, in turns, so that drift hits all alike."""
    steps = {arm: study.step(attention, length, device, dtype) for arm, attention in arms.items()}
    return interleaved(steps, study.rounds)
