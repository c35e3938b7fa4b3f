"""The attention function called by itself: refusals, and calls without a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

from flashlayer.integrations.transformers import attention, make_mask
from tests.integrations.transformers.hosts import HOSTS, NAME, build
from tests.integrations.transformers.situations import model_inputs


class Module(nn.Module):
    """As much of an attention module as the attention function looks at."""

    is_causal = True


def small(queries: int = 4, keys: int = 4, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, heads, queries, 8),
        torch.randn(2, heads, keys, 8),
        torch.randn(2, heads, keys, 8),
    )


@pytest.mark.parametrize(
    ("what", "options", "shape"),
    [
        ("output_attentions", {"output_attentions": True}, (4, 4)),
        ("cache", {"cache": object()}, (4, 4)),
        ("block_table", {"block_table": torch.zeros(1)}, (4, 4)),
        ("indices", {"indices": torch.zeros(1)}, (4, 4)),
        ("block_indices", {"block_indices": torch.zeros(1)}, (4, 4)),
        ("sinks", {"sinks": torch.zeros(1)}, (4, 4)),
        ("sliding_window", {"sliding_window": 2}, (4, 4)),
        ("attention_mask=None", {}, (3, 4)),
        ("attention_mask", {"attention_mask": torch.ones(2, 4)}, (4, 4)),
        (
            "cu_seq_lens_q",
            {
                "attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool),
                "cu_seq_lens_q": torch.tensor([0, 8]),
            },
            (4, 4),
        ),
        (
            "cu_seq_lens_q",
            {"position_bias": torch.ones(1, 2, 4, 4), "cu_seq_lens_q": torch.tensor([0, 8])},
            (4, 4),
        ),
        ("softcap", {"softcap": -1.0}, (4, 4)),
        ("attention_mask", {"attention_mask": make_mask(2, 4, 4)}, (3, 4)),
    ],
)
def test_a_refusal_names_the_model_and_the_option(
    what: str, options: dict[str, Any], shape: tuple[int, int]
) -> None:
    options = {"attention_mask": None} | options
    with pytest.raises(ValueError, match=rf"^model \(Module\): .*{what}"):
        attention(Module(), *small(*shape), **options)


@pytest.mark.parametrize("host", ["Llama", "GPT-2", "Whisper"])
def test_output_attentions_of_the_config_are_refused_by_name(host: str) -> None:
    model = build(host)
    model.config.output_attentions = True
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=rf"^{model.config.model_type} .*output_attentions"):
        model(**model_inputs(model, HOSTS[host].kind, None))


def test_none_for_a_mask_is_refused_where_eager_and_sdpa_read_is_causal_differently() -> None:
    """BridgeTower's cross-modal layers say is_causal and mean no mask, and can't have SDPA."""
    from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerSelfAttention
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    def module(kind: type) -> nn.Module:
        made = kind.__new__(kind)
        nn.Module.__init__(made)
        made.is_causal = True
        return made

    q, k, v = small()
    with pytest.raises(ValueError, match="attention_mask=None: SDPA takes it for causal"):
        attention(module(BridgeTowerSelfAttention), q, k, v, None)
    causal = attention(Module(), q, k, v, make_mask(2, 4, 4))[0]
    torch.testing.assert_close(attention(module(GPT2Attention), q, k, v, None)[0], causal)


def test_a_mask_of_one_query_counts_for_all() -> None:
    q, k, v = small(4, 6)
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    both = masking_utils.bidirectional_mask_function
    row = make_mask(2, 1, 6, mask_function=both, attention_mask=padding)
    dense = padding[:, None, None, :].expand(2, 1, 4, 6)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, dense).transpose(1, 2)
    torch.testing.assert_close(attention(Module(), q, k, v, row)[0], expected)


def test_no_mask_is_what_is_causal_says() -> None:
    q, k, v = small()
    causal = attention(Module(), q, k, v, make_mask(2, 4, 4))[0]
    full = attention(Module(), q, k, v, torch.ones(2, 1, 4, 4, dtype=torch.bool))[0]
    assert (causal - full).abs().max() > 0.1
    torch.testing.assert_close(attention(Module(), q, k, v, None)[0], causal)
    torch.testing.assert_close(attention(Module(), q, k, v, None, is_causal=False)[0], full)
    last = attention(Module(), q[:, :, -1:], k, v, None)[0]
    torch.testing.assert_close(last, causal[:, -1:])
    with pytest.raises(ValueError, match="is_causal"):
        attention(nn.Module(), q, k, v, None)


def test_vision_packs_by_cu_seq_lens_without_a_mask() -> None:
    """As the vision towers of Qwen2-VL do: not causal, one row, several images."""
    q, k, v = (x[:1] for x in small(9, 9))
    edges = torch.tensor([0, 4, 9], dtype=torch.int32)
    options = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "is_causal": False}
    # They hand on a tensor for the longest, too.
    longest = {"max_length_q": edges.diff().max(), "max_length_k": edges.diff().max()}
    out = attention(Module(), q, k, v, None, **options, **longest)[0]
    for start, stop in ((0, 4), (4, 9)):
        alone = (x[:, :, start:stop] for x in (q, k, v))
        expected = attention(Module(), *alone, None, is_causal=False)[0]
        torch.testing.assert_close(out[:, start:stop], expected)
