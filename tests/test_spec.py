"""The geometry, held against the definition by brute force."""

import itertools

import torch

from flashlayer.spec import AttentionSpec

EDGES = (None, 0, 1, 3)
LENGTHS = (1, 2, 5)


def sees(spec: AttentionSpec, i: int, j: int, seqlen_q: int, seqlen_k: int) -> bool:
    """The definition in DESIGN: keys from i + offset - left to i + offset + right inclusive."""
    offset = seqlen_k - seqlen_q if spec.diagonal == "bottom_right" else 0
    left, right = spec.window_left, spec.window_right
    return (left is None or j >= i + offset - left) and (right is None or j <= i + offset + right)


def problems():
    for left, right, diagonal in itertools.product(EDGES, EDGES, ("bottom_right", "top_left")):
        for seqlen_q, seqlen_k in itertools.product(LENGTHS, LENGTHS):
            yield AttentionSpec(1.0, left, right, diagonal), seqlen_q, seqlen_k


def test_visible_is_the_definition() -> None:
    for spec, seqlen_q, seqlen_k in problems():
        visible = spec.visible(
            0, seqlen_q, 0, seqlen_k, seqlen_q, seqlen_k, device=torch.device("cpu")
        )
        expected = [
            [sees(spec, i, j, seqlen_q, seqlen_k) for j in range(seqlen_k)] for i in range(seqlen_q)
        ]
        assert visible.tolist() == expected


def test_key_bounds_are_the_union_and_the_intersection() -> None:
    for spec, seqlen_q, seqlen_k in problems():
        for q_start, q_stop in itertools.combinations(range(seqlen_q + 1), 2):
            windows = [
                {j for j in range(seqlen_k) if sees(spec, i, j, seqlen_q, seqlen_k)}
                for i in range(q_start, q_stop)
            ]
            bounds = spec.key_bounds(q_start, q_stop, seqlen_q, seqlen_k)
            # No visible key is left out ...
            assert set.union(*windows) <= set(range(bounds.any_start, bounds.any_stop))
            # ... and an unmasked tile hides none.
            assert set(range(bounds.all_start, bounds.all_stop)) == set.intersection(*windows)
            if set.union(*windows) and all(windows):
                assert set.union(*windows) == set(range(bounds.any_start, bounds.any_stop))


def test_dropping_idle_edges_changes_nothing() -> None:
    for spec, seqlen_q, seqlen_k in problems():
        lean = spec.without_idle_edges(seqlen_q, seqlen_k)
        for i, j in itertools.product(range(seqlen_q), range(seqlen_k)):
            assert sees(lean, i, j, seqlen_q, seqlen_k) == sees(spec, i, j, seqlen_q, seqlen_k)


def test_one_decoding_step_is_not_masked() -> None:
    spec = AttentionSpec(1.0, None, 0, "bottom_right")
    assert spec.without_idle_edges(1, 100) == AttentionSpec(1.0, None, None, "bottom_right")
    assert spec.without_idle_edges(2, 100) == spec
