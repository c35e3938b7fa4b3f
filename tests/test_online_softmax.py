"""The online-softmax state against softmax and logsumexp."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlayer.online_softmax import SoftmaxState, finalize, init_state, lse, merge, update


def state_of(scores: torch.Tensor, value: torch.Tensor) -> SoftmaxState:
    empty = init_state(scores.shape[:-1], value.shape[-1], dtype=scores.dtype)
    return update(empty, scores, value)


def assert_is_softmax(state: SoftmaxState, scores: torch.Tensor, value: torch.Tensor) -> None:
    torch.testing.assert_close(finalize(state), scores.softmax(-1) @ value)
    torch.testing.assert_close(lse(state), scores.logsumexp(-1))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    keys=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    magnitude=st.sampled_from([0.0, 1.0, 1e4]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order(keys: int, cuts: list[int], magnitude: float, order) -> None:
    generator = torch.Generator().manual_seed(keys)
    scores = magnitude * torch.randn(2, 3, keys, dtype=torch.float64, generator=generator)
    value = torch.randn(2, keys, 4, dtype=torch.float64, generator=generator)
    edges = sorted({0, keys, *(min(cut, keys) for cut in cuts)})
    parts = [
        state_of(scores[..., start:stop], value[:, start:stop])
        for start, stop in itertools.pairwise(edges)
    ]
    while len(parts) > 1:  # a random binary tree of merges
        a = parts.pop(order.randrange(len(parts)))
        b = parts.pop(order.randrange(len(parts)))
        parts.append(merge(a, b))
    assert_is_softmax(parts[0], scores, value)


def test_updates_one_key_at_a_time() -> None:
    """Milakov & Gimelshein, algorithm 3, with a running maximum that changes twice."""
    scores = torch.tensor([[1.0, 5.0, 3.0, 8.0, -2.0]], dtype=torch.float64)
    value = torch.randn(5, 2, dtype=torch.float64)
    state = init_state((1,), 2, dtype=torch.float64)
    for j in range(5):
        state = update(state, scores[:, j : j + 1], value[j : j + 1])
    assert state.m.item() == 8.0
    assert_is_softmax(state, scores, value)


def test_no_overflow_where_exp_overflows() -> None:
    scores = torch.tensor([[1000.0, 999.0], [-1000.0, -1001.0]])
    state = state_of(scores, torch.eye(2))
    assert_is_softmax(state, scores, torch.eye(2))
    assert torch.isinf(scores.exp()).any()


def test_rows_without_keys() -> None:
    nothing = state_of(torch.full((2, 3), -torch.inf), torch.ones(3, 4))
    assert finalize(nothing).tolist() == [[0.0] * 4] * 2
    assert lse(nothing).tolist() == [-torch.inf] * 2
    # The empty state is the neutral element, on both sides.
    some = state_of(torch.randn(2, 3), torch.randn(3, 4))
    for merged in (merge(nothing, some), merge(some, nothing)):
        for actual, expected in zip(merged, some, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_differentiable(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    value = torch.randn(8, 2, dtype=dtype, requires_grad=True)
    state = merge(state_of(scores[:, :5], value[:5]), state_of(scores[:, 5:], value[5:]))
    ours = torch.autograd.grad(finalize(state).square().sum() + lse(state).sum(), (scores, value))
    out = scores.softmax(-1) @ value
    expected = torch.autograd.grad(out.square().sum() + scores.logsumexp(-1).sum(), (scores, value))
    torch.testing.assert_close(ours, expected)
