"""Tells right from wrong in exercise_2.py."""

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

STREAMS = {
    "rising": [1.0, 2.0, 3.0, 4.0],
    "falling": [4.0, 3.0, 2.0, 1.0],
    "ties": [2.0, 2.0, 2.0],
    "far below zero": [-1000.0, -1001.0, -1002.0],
    "far above zero": [1000.0, 1001.0, 999.0],
    "one": [-5.0],
}


def expected_normaliser(scores: list[float]) -> tuple[float, float]:
    m = max(scores)
    return m, sum(math.exp(score - m) for score in scores)


def check_normaliser(answers: ModuleType, scores: list[float], m: float, l: float) -> None:
    m_found, l_found = answers.online_normaliser(iter(scores))
    assert m_found == m, f"m is {m_found}, not {m}, for {scores}"
    assert math.isclose(l_found, l, rel_tol=1e-12), f"l is {l_found}, not {l}, for {scores}"


def test_online_normaliser(answers: ModuleType) -> None:
    for scores in STREAMS.values():
        check_normaliser(answers, scores, *expected_normaliser(scores))


def test_online_normaliser_of_masked_scores(answers: ModuleType) -> None:
    masked = -math.inf
    check_normaliser(answers, [masked, masked, 3.0, masked, 3.0], 3.0, 2.0)
    check_normaliser(answers, [masked, masked], masked, 0.0)
    check_normaliser(answers, [], masked, 0.0)


def test_online_normaliser_keeps_no_scores(answers: ModuleType) -> None:
    """What was read is forgotten before the next is asked for."""

    class Score(float):
        alive = 0
        most = 0

        def __init__(self, _: float) -> None:
            Score.alive += 1
            Score.most = max(Score.most, Score.alive)

        def __del__(self) -> None:
            Score.alive -= 1

    m, l = answers.online_normaliser(Score(i % 7) for i in range(100))
    assert Score.most <= 5, f"{Score.most} of 100 scores were kept at a time"
    assert m == 6
    assert math.isclose(l, expected_normaliser([i % 7 for i in range(100)])[1], rel_tol=1e-12)


def blocks(sizes: list[int], scale: float) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Blocks of these sizes, and the attention over all of them."""
    generator = torch.Generator().manual_seed(0)
    made = [
        (
            scale * torch.randn(3, size, generator=generator),
            torch.randn(size, 4, generator=generator),
        )
        for size in sizes
    ]
    scores = torch.cat([s for s, _ in made], dim=1)
    return made, torch.softmax(scores, -1) @ torch.cat([v for _, v in made])


def test_streaming_attention(answers: ModuleType) -> None:
    for sizes in ([5], [4, 4], [1, 7, 2, 16, 3]):
        made, expected = blocks(sizes, scale=3.0)
        torch.testing.assert_close(answers.streaming_attention(block for block in made), expected)


def test_streaming_attention_of_large_scores(answers: ModuleType) -> None:
    made, expected = blocks([3, 8, 8], scale=200.0)
    torch.testing.assert_close(answers.streaming_attention(iter(made)), expected)


def test_streaming_attention_of_queries_far_apart(answers: ModuleType) -> None:
    made, _ = blocks([4, 4], scale=1.0)
    shift = torch.tensor([[500.0], [0.0], [-500.0]])
    made = [(scores + shift, values) for scores, values in made]
    expected = torch.softmax(torch.cat([s for s, _ in made], dim=1), -1)
    expected = expected @ torch.cat([v for _, v in made])
    torch.testing.assert_close(answers.streaming_attention(iter(made)), expected)


class Tape:
    """A row in slow memory, which counts."""

    def __init__(self, items: list[float]) -> None:
        self.items, self.reads, self.writes = items, 0, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> float:
        if i >= len(self.items):  # where a for loop ends
            raise IndexError(i)
        self.reads += 1
        return self.items[i]

    def __setitem__(self, i: int, item: float) -> None:
        self.writes += 1
        self.items[i] = item

    def __iter__(self) -> Iterator[float]:
        return (self[i] for i in range(len(self.items)))


def test_softmax_in_two_passes(answers: ModuleType) -> None:
    for scores in STREAMS.values():
        s, p = Tape(list(scores)), Tape([math.nan] * len(scores))
        answers.softmax_in_two_passes(s, p)
        expected = torch.softmax(torch.tensor(scores, dtype=torch.float64), -1)
        torch.testing.assert_close(torch.tensor(p.items, dtype=torch.float64), expected)
        assert s.reads <= 2 * len(s), f"{s.reads} reads of {len(s)} scores"
        assert (p.reads, p.writes) == (0, len(p)), f"{p.reads} reads, {p.writes} writes of weights"
