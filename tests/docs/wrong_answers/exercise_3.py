"""Wrong in ways that look right. `f__why` takes the place of `f`."""

import torch

from docs.exercises.solutions.exercise_3 import State


def merge__without_the_guard(a, b):
    m = torch.maximum(a.m, b.m)
    a_weight, b_weight = torch.exp(a.m - m), torch.exp(b.m - m)
    return State(
        m,
        a_weight * a.l + b_weight * b.l,
        a_weight[:, None] * a.o + b_weight[:, None] * b.o,
    )


def merge__b_always_has_the_maximum(a, b):
    m = torch.maximum(a.m, b.m)
    weight = torch.exp(a.m - torch.where(m == -torch.inf, 0, m))
    return State(m, weight * a.l + b.l, weight[:, None] * a.o + b.o)


def merge__o_without_weights(a, b):
    m = torch.maximum(a.m, b.m)
    shift = torch.where(m == -torch.inf, 0, m)
    return State(m, torch.exp(a.m - shift) * a.l + torch.exp(b.m - shift) * b.l, a.o + b.o)


def merge__nan_to_zero(a, b):
    """Hides the trap, and the queries that are masked in one part with it."""
    m = torch.maximum(a.m, b.m).clamp(min=-1e3)
    a_weight, b_weight = torch.exp(a.m - m), torch.exp(b.m - m)
    return State(
        m,
        a_weight * a.l + b_weight * b.l,
        a_weight[:, None] * a.o + b_weight[:, None] * b.o,
    )


def merge_outputs__their_average(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2


def merge_outputs__unshifted_weights(out_a, lse_a, out_b, lse_b):
    a, b = torch.exp(lse_a)[:, None], torch.exp(lse_b)[:, None]
    return (a * out_a + b * out_b) / (a + b)


def merge_outputs__sigmoid_of_the_difference(out_a, lse_a, out_b, lse_b):
    """Right, and short, where one of the two has seen a key."""
    weight = torch.sigmoid(lse_a - lse_b)[:, None]
    return weight * out_a + (1 - weight) * out_b


def merge_outputs__weighted_by_lse(out_a, lse_a, out_b, lse_b):
    weight = (lse_a / (lse_a + lse_b))[:, None]
    return weight * out_a + (1 - weight) * out_b


def streaming_entropy__extra_sum_updated_like_o(blocks):
    m, l, t = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores in blocks:
        m_new = torch.maximum(m, scores.amax(dim=1))
        rescale, shifted = torch.exp(m - m_new), scores - m_new[:, None]
        p = torch.exp(shifted)
        m, l, t = m_new, rescale * l + p.sum(dim=1), rescale * t + (p * shifted).sum(dim=1)
    return torch.log(l) - t / l


def streaming_entropy__log_l_without_m(blocks):
    m, l, t = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores in blocks:
        m_new = torch.maximum(m, scores.amax(dim=1))
        rescale, p = torch.exp(m - m_new), torch.exp(scores - m_new[:, None])
        m, l, t = m_new, rescale * l + p.sum(dim=1), rescale * t + (p * scores).sum(dim=1)
    return torch.log(l) - t / l


def streaming_entropy__mean_of_the_blocks(blocks):
    found = []
    for scores in blocks:
        log_p = torch.log_softmax(scores, -1)
        found.append(-(log_p.exp() * log_p).sum(-1))
    return torch.stack(found).mean(0)
