"""Tells right from wrong in exercise_1.py."""

from types import ModuleType

import torch


def test_safe_softmax_of_ordinary_scores(answers: ModuleType) -> None:
    scores = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    torch.testing.assert_close(answers.safe_softmax(scores), torch.softmax(scores, -1))
    assert torch.equal(scores, before), "the scores were changed in place"


def test_safe_softmax_of_large_and_small_scores(answers: ModuleType) -> None:
    for shift in (-1e4, -100.0, 100.0, 1e4):
        scores = torch.tensor([0.0, 1.0, 2.0]) + shift
        torch.testing.assert_close(answers.safe_softmax(scores), torch.softmax(scores, -1))


def test_safe_softmax_of_rows_far_apart(answers: ModuleType) -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [-1000.0, -1001.0, -1002.0], [900.0, 900.0, -900.0]])
    torch.testing.assert_close(answers.safe_softmax(scores), torch.softmax(scores, -1))


def test_safe_softmax_of_masked_scores(answers: ModuleType) -> None:
    masked = -torch.inf
    scores = torch.tensor([[masked, 5.0, masked], [masked, masked, masked]])
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(answers.safe_softmax(scores), expected)


def test_log_softmax(answers: ModuleType) -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, -200.0, -1e4], [1000.0, 0.0, 1000.0]])
    torch.testing.assert_close(answers.log_softmax(scores), torch.log_softmax(scores, -1))


def test_sigmoid(answers: ModuleType) -> None:
    x = torch.tensor([-1000.0, -80.0, -1.0, 0.0, 1.0, 80.0, 1000.0])
    torch.testing.assert_close(answers.sigmoid(x), torch.sigmoid(x), rtol=1e-6, atol=0)


def test_gradient_of_sigmoid(answers: ModuleType) -> None:
    x = torch.tensor([-1000.0, -80.0, -1.0, 1.0, 80.0, 1000.0], requires_grad=True)
    (grad,) = torch.autograd.grad(answers.sigmoid(x).sum(), x)
    expected = torch.sigmoid(x.detach()) * torch.sigmoid(-x.detach())
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=0)
