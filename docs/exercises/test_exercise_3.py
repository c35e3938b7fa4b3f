"""Tells right from wrong in exercise_3.py."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    m: Tensor
    l: Tensor
    o: Tensor


def keys(count: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores of 4 queries and the values of ``count`` keys."""
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(4, count, generator=generator, dtype=torch.float64)
    return scores, torch.randn(count, 3, generator=generator, dtype=torch.float64)


def state(scores: Tensor, values: Tensor) -> State:
    m = scores.amax(dim=1)
    p = torch.exp(scores - torch.where(m == -torch.inf, 0, m)[:, None])
    return State(m, p.sum(dim=1), p @ values)


def check_merge(answers: ModuleType, scores: Tensor, values: Tensor, cut: int) -> None:
    a, b = state(scores[:, :cut], values[:cut]), state(scores[:, cut:], values[cut:])
    expected = state(scores, values)
    for merged in (answers.merge(a, b), answers.merge(b, a)):
        for name, got, want in zip("mlo", merged, expected, strict=True):
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


def test_merge(answers: ModuleType) -> None:
    for scale in (1.0, 30.0, 1000.0):
        for cut in (1, 8, 15):
            check_merge(answers, *keys(16, scale), cut)


def test_merge_where_nothing_was_seen(answers: ModuleType) -> None:
    scores, values = keys(16, 3.0)
    scores[0, :8] = -torch.inf  # nothing in a
    scores[1, 8:] = -torch.inf  # nothing in b
    scores[2] = -torch.inf  # nothing at all
    check_merge(answers, scores, values, 8)


def check_outputs(answers: ModuleType, scores: Tensor, values: Tensor, cut: int) -> None:
    def attention(scores: Tensor, values: Tensor) -> Tensor:
        return torch.softmax(scores, -1).nan_to_num(0) @ values

    parts = []
    for part in (slice(None, cut), slice(cut, None)):
        parts += [attention(scores[:, part], values[part]), scores[:, part].logsumexp(-1)]
    torch.testing.assert_close(answers.merge_outputs(*parts), attention(scores, values))


def test_merge_outputs(answers: ModuleType) -> None:
    for scale in (1.0, 1000.0):
        for cut in (1, 5, 15):
            check_outputs(answers, *keys(16, scale), cut)
    scores, values = keys(16, 1.0)
    for shift in (-2000.0, 2000.0):
        check_outputs(answers, scores + shift, values, 5)


def test_merge_outputs_where_nothing_was_seen(answers: ModuleType) -> None:
    scores, values = keys(16, 3.0)
    scores[0, :8] = -torch.inf
    scores[1, 8:] = -torch.inf
    scores[2] = -torch.inf
    check_outputs(answers, scores, values, 8)


def check_entropy(answers: ModuleType, scores: Tensor, sizes: list[int]) -> None:
    log_p = torch.log_softmax(scores, -1)
    expected = -(log_p.exp() * log_p).sum(-1)
    found = answers.streaming_entropy(block for block in scores.split(sizes, dim=1))
    torch.testing.assert_close(found, expected)


def test_streaming_entropy_of_one_block(answers: ModuleType) -> None:
    scores, _ = keys(16, 2.0)
    check_entropy(answers, scores, [16])
    check_entropy(answers, scores + 1000, [16])


def test_streaming_entropy(answers: ModuleType) -> None:
    scores, _ = keys(16, 2.0)
    check_entropy(answers, torch.zeros(4, 16, dtype=torch.float64), [4, 4, 8])  # log 16
    check_entropy(answers, scores, [4, 4, 8])
    check_entropy(answers, scores.sort().values, [1] * 16)  # a new maximum every time
    check_entropy(answers, scores - 1000, [3, 13])
    check_entropy(answers, 500 * scores, [8, 8])
