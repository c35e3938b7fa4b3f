"""Wrong in ways that look right. `f__why` takes the place of `f`."""

import torch


def log_sum_exp__as_written(scores):
    return torch.log(torch.exp(scores).sum(dim=-1))


def log_sum_exp__maximum_not_added_back(scores):
    m = scores.amax(dim=-1, keepdim=True)
    return torch.log(torch.exp(scores - m).sum(dim=-1))


def log_sum_exp__nothing_is_nan(scores):
    m = scores.amax(dim=-1)
    return m + torch.log(torch.exp(scores - m.unsqueeze(-1)).sum(dim=-1))


def probabilities__softmax_of_the_tile(scores, lse):
    return torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)


def probabilities__a_row_without_keys_is_nan(scores, lse):
    return torch.exp(scores - lse.unsqueeze(-1))


def probabilities__maximum_subtracted_too(scores, lse):
    m = scores.amax(dim=-1, keepdim=True)
    return torch.nan_to_num(torch.exp(scores - m - lse.unsqueeze(-1)), nan=0.0)


def merge__mean_of_the_parts(outs, lses):
    return torch.stack(outs).mean(dim=0), torch.logsumexp(torch.stack(lses), dim=0)


def merge__without_rescaling(outs, lses):
    return torch.stack(outs).sum(dim=0), torch.logsumexp(torch.stack(lses), dim=0)


def merge__weights_are_the_lses(outs, lses):
    stacked = torch.nan_to_num(torch.stack(lses), neginf=0.0)
    weights = stacked / stacked.sum(dim=0)
    return (weights.unsqueeze(-1) * torch.stack(outs)).sum(dim=0), torch.logsumexp(stacked, dim=0)


def merge__lses_added(outs, lses):
    stacked = torch.stack(lses)
    weights = torch.softmax(stacked, dim=0)
    return (weights.unsqueeze(-1) * torch.stack(outs)).sum(dim=0), stacked.sum(dim=0)


def merge__overflows(outs, lses):
    totals = torch.exp(torch.stack(lses))
    out = (totals.unsqueeze(-1) * torch.stack(outs)).sum(dim=0) / totals.sum(dim=0).unsqueeze(-1)
    return out, torch.log(totals.sum(dim=0))


def delta__without_dlse(out, do, dlse):
    return (out * do).sum(dim=-1)


def delta__dlse_added(out, do, dlse):
    mean = (out * do).sum(dim=-1)
    return mean if dlse is None else mean + dlse


def delta__mean_over_columns(out, do, dlse):
    mean = (out * do).mean(dim=-1)
    return mean if dlse is None else mean - dlse


def add_sink__output_not_rescaled(out, lse, sink):
    return out, torch.logaddexp(lse, torch.full_like(lse, sink))


def add_sink__sink_added_to_the_lse(out, lse, sink):
    total = lse + sink
    return torch.exp(lse - total).unsqueeze(-1) * out, total


def add_sink__overflows(out, lse, sink):
    total = torch.log(torch.exp(lse) + torch.exp(torch.tensor(sink, dtype=lse.dtype)))
    return torch.exp(lse - total).unsqueeze(-1) * out, total
