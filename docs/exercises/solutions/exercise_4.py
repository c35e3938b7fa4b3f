"""Solutions of exercise_4.py."""

import torch
from torch import Tensor


def log_sum_exp(scores: Tensor) -> Tensor:
    """The maximum, and the logarithm of what is left."""
    m = scores.amax(dim=-1)
    # The maximum of nothing is -inf, and -inf - -inf is NaN; log(0) is the -inf that is asked for.
    shift = torch.where(m == -torch.inf, 0, m)
    return shift + torch.log(torch.exp(scores - shift.unsqueeze(-1)).sum(dim=-1))


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """One exponential for each entry; +inf in place of -inf makes it 0."""
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    return torch.exp(scores - lse.unsqueeze(-1))


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the parts: their LSEs are the scores, their outputs the values."""
    stacked = torch.stack(lses)  # [parts, M]
    weights = torch.softmax(stacked, dim=0)
    return (weights.unsqueeze(-1) * torch.stack(outs)).sum(dim=0), torch.logsumexp(stacked, dim=0)


def delta(out: Tensor, do: Tensor, dlse: Tensor | None) -> Tensor:
    """The mean of dP under P, less what arrives through the LSE."""
    mean = (out * do).sum(dim=-1)
    return mean if dlse is None else mean - dlse


def add_sink(out: Tensor, lse: Tensor, sink: float) -> tuple[Tensor, Tensor]:
    """A merge with a part whose output is 0."""
    total = torch.logaddexp(lse, torch.full_like(lse, sink))
    return torch.exp(lse - total).unsqueeze(-1) * out, total
