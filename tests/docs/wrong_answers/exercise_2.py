"""Wrong in ways that look right. `f__why` takes the place of `f`."""

import math

import torch


def online_normaliser__without_the_rescale(scores):
    m, l = -math.inf, 0.0
    for score in scores:
        if score > -math.inf:
            m = max(m, score)
            l += math.exp(score - m)
    return m, l


def online_normaliser__starts_at_zero(scores):
    m, l = 0.0, 0.0
    for score in scores:
        m_new = max(m, score)
        m, l = m_new, l * math.exp(m - m_new) + math.exp(score - m_new)
    return m, l


def online_normaliser__two_masked_scores_are_nan(scores):
    m, l = -math.inf, 0.0
    for score in scores:
        m_new = max(m, score)
        m, l = m_new, l * math.exp(m - m_new) + math.exp(score - m_new)
    return m, l


def online_normaliser__keeps_the_stream(scores):
    scores = [score for score in scores if score > -math.inf]
    m = max(scores, default=-math.inf)
    return m, sum(math.exp(score - m) for score in scores)


def online_normaliser__rescales_the_new_term_too(scores):
    m, l = -math.inf, 0.0
    for score in scores:
        if score > -math.inf:
            m_new = max(m, score)
            rescale = math.exp(m - m_new) if l else 1.0
            m, l = m_new, (l + math.exp(score - m_new)) * rescale
    return m, l


def online_normaliser__rescale_upside_down(scores):
    m, l = -math.inf, 0.0
    for score in scores:
        if score > -math.inf:
            m_new = max(m, score)
            rescale = math.exp(min(m_new - m, 700.0)) if l else 0.0
            m, l = m_new, l * rescale + math.exp(score - m_new)
    return m, l


def streaming_attention__average_of_averages(blocks):
    averages = [torch.softmax(scores, -1) @ values for scores, values in blocks]
    return torch.stack(averages).mean(0)


def streaming_attention__forgets_to_rescale_o(blocks):
    m, l, o = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores, values in blocks:
        m_new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        p = torch.exp(scores - m_new)
        l = l * torch.exp(m - m_new) + p.sum(dim=1, keepdim=True)
        m, o = m_new, o + p @ values
    return o / l


def streaming_attention__the_last_maximum_only(blocks):
    m, l, o = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores, values in blocks:
        m_new = scores.amax(dim=1, keepdim=True)
        rescale, p = torch.exp(m - m_new), torch.exp(scores - m_new)
        m, l, o = m_new, l * rescale + p.sum(dim=1, keepdim=True), o * rescale + p @ values
    return o / l


def streaming_attention__one_maximum_for_all_queries(blocks):
    m, l, o = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores, values in blocks:
        m_new = torch.maximum(m, scores.max())
        rescale, p = torch.exp(m - m_new), torch.exp(scores - m_new)
        m, l, o = m_new, l * rescale + p.sum(dim=1, keepdim=True), o * rescale + p @ values
    return o / l


def softmax_in_two_passes__in_three(scores, weights):
    m = max(scores[i] for i in range(len(scores)))
    l = sum(math.exp(scores[i] - m) for i in range(len(scores)))
    for i in range(len(scores)):
        weights[i] = math.exp(scores[i] - m) / l


def softmax_in_two_passes__unsafe(scores, weights):
    l = sum(math.exp(min(scores[i], 700.0)) for i in range(len(scores)))
    for i in range(len(scores)):
        weights[i] = math.exp(min(scores[i], 700.0)) / (l or 1.0)


def softmax_in_two_passes__weights_used_as_scratch(scores, weights):
    m = max(scores[i] for i in range(len(scores)))
    l = 0.0
    for i in range(len(scores)):
        weights[i] = math.exp(scores[i] - m)
        l += weights[i]
    for i in range(len(scores)):
        weights[i] = weights[i] / l
