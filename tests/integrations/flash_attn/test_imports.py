"""Signatures of flash_attn, its import paths, and a model that was written for it."""

import inspect
import subprocess
import sys

import pytest

from flashlayer.integrations import flash_attn as door

SIGNATURES = {
    "flash_attn_func": "q k v",
    "flash_attn_kvpacked_func": "q kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen",
}

SHARED = (
    "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs"
)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    """Order and names of flash_attn 2.8.3, flash_attn_interface.py."""
    parameters = inspect.signature(getattr(door, name)).parameters
    expected = f"{SIGNATURES[name]} {SHARED}".split()
    if name == "flash_attn_varlen_func":
        expected.append("block_table")
    assert list(parameters) == expected
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    assert defaults[:8] == [0.0, None, False, (-1, -1), 0.0, None, False, False]


def test_kvcache_signature() -> None:
    names = (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad",
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes",
        "num_splits return_softmax_lse",
    )
    parameters = inspect.signature(door.flash_attn_with_kvcache).parameters
    assert list(parameters) == " ".join(names).split()
    assert parameters["rotary_interleaved"].default is True


@pytest.mark.parametrize(
    "how",
    [
        "import sys; sys.modules['flash_attn'] = flashlayer.integrations.flash_attn",
        "flashlayer.integrations.flash_attn.install()",
    ],
)
def test_existing_imports_run(how: str) -> None:
    program = f"""
import importlib.util, torch, flashlayer
{how}
import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_func
import flash_attn.flash_attn_interface as interface
assert importlib.util.find_spec("flash_attn") is not None
assert tuple(map(int, flash_attn.__version__.split("."))) >= (2, 8)
q = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16)
for attend in (flash_attn_func, interface.flash_attn_func):
    print(tuple(attend(q, q, q, causal=True).shape))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["(1, 4, 2, 8)"] * 2


def test_a_model_written_for_it_runs() -> None:
    """transformers' own flash_attention_2 code: padded, packed and generating, against its SDPA."""
    pytest.importorskip("transformers")
    program = """
import functools, sys, torch, flashlayer
sys.modules["flash_attn"] = flashlayer.integrations.flash_attn
import transformers.modeling_flash_attention_utils as host
from transformers import MistralConfig, MistralForCausalLM
host.is_flash_attn_2_available = lambda **_: True  # it looks for a CUDA device
calls, varlen = [], flashlayer.integrations.flash_attn.flash_attn_varlen_func
@functools.wraps(varlen)  # its parameters are looked at
def counted(*args, **kwargs):
    calls.append(1)
    return varlen(*args, **kwargs)
flashlayer.integrations.flash_attn.flash_attn_varlen_func = counted
config = MistralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=50,
                       num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
                       initializer_range=0.3)
model = MistralForCausalLM(config).double().eval()
ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
mask[0, :3] = 0
positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
results = []
for name in ("sdpa", "flash_attention_2"):
    model.config._attn_implementation = name
    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    packed = model(ids[:1], position_ids=positions, use_cache=False).logits.detach()
    written = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    results.append((out.logits.detach()[mask.bool()], packed, written, *grads))
torch.testing.assert_close(*results)
assert len(calls) >= 4, calls
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
