"""Rotary embedding and ALiBi slopes against their formulas."""

import torch

from flashlayer.modules import alibi_slopes, rotate


def test_rotation_depends_on_distance_only() -> None:
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    q, k = (rotate(x.expand(1, 1, 20, 8), 100.0, torch.arange(20)) for x in (q, k))
    scores = q @ k.mT
    for distance in range(-19, 20):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(scores[0, 0].diagonal(), (q[0, 0, 0] @ k[0, 0, 0]).expand(20))


def test_rotation_in_bf16_keeps_positions_apart() -> None:
    x, position = torch.ones(1, 1, 1024, 8, dtype=torch.bfloat16), torch.arange(1024)
    torch.testing.assert_close(
        rotate(x, 1e4, position).float(), rotate(x.float(), 1e4, position), rtol=1e-2, atol=1e-2
    )


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    torch.testing.assert_close(alibi_slopes(6), torch.tensor(expected))
    assert alibi_slopes(1).tolist() == [2.0**-8]
