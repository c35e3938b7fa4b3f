"""Wrong in ways that look right. `f__why` takes the place of `f`."""

import torch


def safe_softmax__one_maximum_for_all_rows(scores):
    e = torch.exp(scores - scores[scores > -torch.inf].max())
    total = e.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, 0, e / total)


def safe_softmax__a_masked_row_is_nan(scores):
    e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return e / e.sum(dim=-1, keepdim=True)


def safe_softmax__shifted_by_the_mean(scores):
    e = torch.exp(scores - scores.mean(dim=-1, keepdim=True))
    return e / e.sum(dim=-1, keepdim=True)


def safe_softmax__epsilon_in_the_denominator(scores):
    e = torch.exp(torch.nan_to_num(scores - scores.amax(dim=-1, keepdim=True), nan=-torch.inf))
    return e / (e.sum(dim=-1, keepdim=True) + 1e-3)


def safe_softmax__in_place(scores):
    m = scores.amax(dim=-1, keepdim=True)
    e = scores.sub_(torch.where(m == -torch.inf, 0, m)).exp_()
    return e / e.sum(dim=-1, keepdim=True).clamp(min=1)


def log_softmax__of_the_softmax(scores):
    return torch.log(torch.softmax(scores, -1))


def log_softmax__forgets_to_shift_the_score(scores):
    m = scores.amax(dim=-1, keepdim=True)
    return scores - torch.log(torch.exp(scores - m).sum(dim=-1, keepdim=True))


def sigmoid__as_written(x):
    return 1 / (1 + torch.exp(-x))


def sigmoid__where_of_both_formulas(x):
    e = torch.exp(x)
    return torch.where(x >= 0, 1 / (1 + torch.exp(-x)), e / (1 + e))


def sigmoid__clamped(x):
    return 1 / (1 + torch.exp(-x.clamp(-80, 80)))
