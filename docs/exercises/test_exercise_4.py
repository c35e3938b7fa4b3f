"""Tells right from wrong in exercise_4.py."""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_log_sum_exp(answers: ModuleType) -> None:
    scores = normal(3, 5, 7)
    torch.testing.assert_close(answers.log_sum_exp(scores), torch.logsumexp(scores, -1))


def test_log_sum_exp_of_large_and_small_scores(answers: ModuleType) -> None:
    scores = normal(4, 6) + torch.tensor([[-1e4], [-800.0], [800.0], [1e4]])
    torch.testing.assert_close(answers.log_sum_exp(scores), torch.logsumexp(scores, -1))


def test_log_sum_exp_of_nothing(answers: ModuleType) -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf], [-torch.inf, 2.0]])
    torch.testing.assert_close(answers.log_sum_exp(scores), torch.tensor([-torch.inf, 2.0]))


def test_probabilities_of_a_tile(answers: ModuleType) -> None:
    scores = 3 * normal(5, 40)
    p = torch.softmax(scores, -1)
    lse = torch.logsumexp(scores, -1)
    torch.testing.assert_close(answers.probabilities(scores[:, 8:20], lse), p[:, 8:20])


def test_probabilities_of_hidden_keys(answers: ModuleType) -> None:
    scores = normal(3, 4)
    scores[0, 1] = -torch.inf
    scores[2] = -torch.inf
    expected = torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)
    torch.testing.assert_close(answers.probabilities(scores, torch.logsumexp(scores, -1)), expected)


def parts_of(scores: Tensor, value: Tensor, edges: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Attention to each part of the keys; zeros and -inf where a row sees none of them."""
    outs, lses = [], []
    for start, stop in pairwise(edges):
        p = torch.nan_to_num(torch.softmax(scores[:, start:stop], -1), nan=0.0)
        outs.append(p @ value[start:stop])
        lses.append(torch.logsumexp(scores[:, start:stop], -1))
    return outs, lses


def test_merge(answers: ModuleType) -> None:
    scores, value = 2 * normal(6, 30), normal(30, 4, seed=1)
    for edges in ([0, 30], [0, 10, 30], [0, 1, 12, 29, 30]):
        out, lse = answers.merge(*parts_of(scores, value, edges))
        torch.testing.assert_close(out, torch.softmax(scores, -1) @ value)
        torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def test_merge_of_parts_far_apart(answers: ModuleType) -> None:
    scores, value = normal(4, 12), normal(12, 3, seed=1)
    scores[:, 4:8] += 900
    scores[:, 8:] -= 900
    out, lse = answers.merge(*parts_of(scores, value, [0, 4, 8, 12]))
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ value)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def test_merge_of_a_part_that_a_row_does_not_see(answers: ModuleType) -> None:
    scores, value = normal(4, 12), normal(12, 3, seed=1)
    scores[1, :4] = -torch.inf
    scores[2, 4:] = -torch.inf
    out, lse = answers.merge(*parts_of(scores, value, [0, 4, 8, 12]))
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ value)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def score_gradients(answers: ModuleType, with_lse: bool) -> tuple[Tensor, Tensor]:
    """The gradient of the scores by the answer and by autograd."""
    scores, value, do = normal(4, 6).requires_grad_(), normal(6, 3, seed=1), normal(4, 3, seed=2)
    dlse = normal(4, seed=3) if with_lse else None
    p = torch.softmax(scores, -1)
    loss = ((p @ value) * do).sum()
    if dlse is not None:
        loss = loss + (torch.logsumexp(scores, -1) * dlse).sum()
    (expected,) = torch.autograd.grad(loss, scores)
    p = p.detach()
    answer = answers.delta(p @ value, do, dlse)
    assert answer.shape == (4,)
    return p * (do @ value.mT - answer.unsqueeze(-1)), expected


def test_delta(answers: ModuleType) -> None:
    torch.testing.assert_close(*score_gradients(answers, with_lse=False))


def test_delta_with_a_gradient_of_the_lse(answers: ModuleType) -> None:
    torch.testing.assert_close(*score_gradients(answers, with_lse=True))


def test_add_sink(answers: ModuleType) -> None:
    for size in (1.0, 300.0):
        scores, value = size * normal(5, 8), normal(8, 3, seed=1)
        for sink in (-2.0, 1.5, 900.0):
            longer = torch.cat([scores, torch.full((5, 1), sink, dtype=torch.float64)], -1)
            out, lse = answers.add_sink(
                torch.softmax(scores, -1) @ value, torch.logsumexp(scores, -1), sink
            )
            torch.testing.assert_close(out, torch.softmax(longer, -1)[:, :-1] @ value)
            torch.testing.assert_close(lse, torch.logsumexp(longer, -1))
