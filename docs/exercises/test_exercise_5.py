"""Tells right from wrong in exercise_5.py."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def walked_bytes(
    seqlen_q: int, seqlen_k: int, head_dim: int, query_heads: int, kv_heads: int, block_m: int
) -> int:
    """The same by walking the loops."""
    total = 0
    for _ in range(query_heads):
        for start in range(0, seqlen_q, block_m):
            rows = min(start + block_m, seqlen_q) - start
            total += 2 * rows * head_dim  # q is read
            total += 2 * 2 * seqlen_k * head_dim  # k and v are read
            total += 2 * rows * head_dim + 4 * rows  # o and the log-sum-exp are written
    return total


def test_flash_bytes(answers: ModuleType) -> None:
    for problem in (
        (512, 512, 64, 1, 1, 128),
        (500, 500, 64, 1, 1, 128),
        (100, 900, 40, 1, 1, 64),
        (1, 4096, 128, 8, 2, 64),
        (300, 300, 16, 6, 3, 128),
    ):
        assert answers.flash_bytes(*problem) == walked_bytes(*problem), problem


def test_key_tiles(answers: ModuleType) -> None:
    for seqlen, block_m, block_n in ((256, 64, 32), (256, 32, 64), (100, 64, 32), (70, 7, 8)):
        for q_start in range(0, seqlen, block_m):
            tiles = answers.key_tiles(q_start, q_start + block_m, seqlen, block_n)
            queries = range(q_start, min(q_start + block_m, seqlen))
            seen = queries[-1] + 1
            starts = list(range(0, seen, block_n))
            where = f"queries {queries.start} to {queries[-1]} of {seqlen}, tiles of {block_n}"
            assert [tile[0] for tile in tiles] == starts, where
            assert [tile[1] for tile in tiles] == [min(s + block_n, seen) for s in starts], where
            needed = [any(k_stop - 1 > i for i in queries) for _, k_stop, _ in tiles]
            assert [tile[2] for tile in tiles] == needed, where


def nothing(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    zeros = torch.zeros(rows, columns, dtype=torch.float64)
    return zeros[:, 0] - torch.inf, zeros[:, 0], zeros


def check_state(state: tuple[Tensor, Tensor, Tensor], scores: Tensor, v: Tensor) -> None:
    """Whether it is the state of these scaled scores."""
    m_i, l_i, acc = state
    torch.testing.assert_close(m_i, scores.amax(-1))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    torch.testing.assert_close(l_i, weights.sum(-1))
    torch.testing.assert_close(acc, weights @ v)


def test_update(answers: ModuleType) -> None:
    x, v = 4 * normal(5, 24), normal(24, 3, seed=1)
    for scale in (1.0, 0.3, 300.0):
        state = nothing(5, 3)
        for columns in torch.arange(24).split(9):
            state = answers.update(*state, x[:, columns], v[columns], scale)
        check_state(state, x * scale, v)


def test_update_of_a_row_that_sees_nothing_yet(answers: ModuleType) -> None:
    x, v = normal(3, 8), normal(8, 2, seed=1)
    x[1, :4] = -torch.inf
    state = answers.update(*nothing(3, 2), x[:, :4], v[:4], 0.5)
    assert state[0][1] == -torch.inf
    assert state[1][1] == 0
    check_state(answers.update(*state, x[:, 4:], v[4:], 0.5), x * 0.5, v)


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and look at what came out."""
        result = op(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_flash_forward(answers: ModuleType) -> None:
    for length, block_m, block_n in ((64, 16, 16), (50, 16, 8), (50, 8, 32), (7, 16, 16)):
        for scale in (0.5, 200.0):
            q, k, v = (normal(length, 4, seed=seed) for seed in range(3))
            hidden = torch.ones(length, length).triu(1).bool()
            scores = (scale * q @ k.mT).masked_fill(hidden, -math.inf)
            with Sizes() as sizes:
                out, lse = answers.flash_forward(q, k, v, scale, block_m, block_n)
            torch.testing.assert_close(out, torch.softmax(scores, -1) @ v)
            torch.testing.assert_close(lse, torch.logsumexp(scores, -1))
            allowed = max(length * 4, block_m * block_n)
            assert sizes.largest <= allowed, f"a tensor of {sizes.largest} numbers was made"
