import math

import pytest
import torch

from train import UsageError
from train.model import ATTENTIONS, GPT, GPTConfig


def qkv(length: int = 33) -> list[torch.Tensor]:
    """Strided views of one fused projection, as the model hands them out."""
    fused = torch.randn(2, length, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    return list(fused.permute(2, 0, 3, 1, 4).unbind(0))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_is_causal_softmax_attention(name: str) -> None:
    inputs = qkv()
    do = torch.randn(2, 4, 33, 16, dtype=torch.float64)
    expected = ATTENTIONS["standard"](*inputs)
    out = ATTENTIONS[name](*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, do),
        torch.autograd.grad(expected, inputs, do),
        rtol=1e-11,
        atol=1e-12,
    )


def test_control_rounds_differently_from_standard() -> None:
    q, k, v = (x.float() for x in qkv(257))
    assert not torch.equal(ATTENTIONS["control"](q, k, v), ATTENTIONS["standard"](q, k, v))


def test_a_token_depends_on_no_later_one() -> None:
    model = GPT(GPTConfig(context=16, n_layer=2, n_head=2, n_embd=16))
    tokens = torch.randint(257, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = 0
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same[:10].all()
    assert not same[10:].any()


def test_attention_reads_views_of_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.extend((q, k, v))
        return q

    monkeypatch.setitem(ATTENTIONS, "spy", spy)
    model = GPT(GPTConfig(context=8, n_layer=1, n_head=2, n_embd=8, attention="spy"))
    model(torch.zeros(1, 8, dtype=torch.long))
    assert [tuple(x.shape) for x in seen] == [(1, 2, 8, 4)] * 3
    assert len({x.untyped_storage().data_ptr() for x in seen}) == 1


def test_initial_weights_are_gpt2s_and_alike_for_every_attention() -> None:
    models = []
    for attention in ("standard", "control"):
        torch.manual_seed(7)
        models.append(GPT(GPTConfig(n_layer=8, attention=attention)))
    ours, control = (model.state_dict() for model in models)
    assert all(torch.equal(ours[name], control[name]) for name in ours)

    block = models[0].blocks[0]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    scaled = 0.02 / math.sqrt(2 * 8)
    assert block.attention.proj.weight.std().item() == pytest.approx(scaled, rel=0.05)
    assert block.mlp["proj"].weight.std().item() == pytest.approx(scaled, rel=0.05)
    assert models[0].head.weight is models[0].tokens.weight


def test_gpt2_small_has_124_million_parameters() -> None:
    shape = GPTConfig(vocab_size=50257, context=1024, n_layer=12, n_head=12, n_embd=768)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in GPT(shape).parameters())
    assert count == 124_439_808  # Hugging Face's "gpt2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "flush"}, "unknown attention 'flush': choose one of flash, standard"),
        ({"n_embd": 130}, "n_embd (130) must be a multiple of n_head (4)"),
        ({"n_layer": 0}, "n_layer must be at least 1, not 0"),
    ],
)
def test_impossible_shapes_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UsageError) as error:
        GPTConfig(**options)
    assert words in str(error.value)


def test_generate_samples_past_the_context_and_obeys_its_seed() -> None:
    model = GPT(GPTConfig(context=8, n_layer=1, n_head=2, n_embd=16))
    start = torch.tensor([[1, 2, 3]])

    def draw(seed: int, top_k: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(start, 20, temperature=1.0, top_k=top_k, generator=generator)

    assert draw(0, 50).shape == (1, 23)
    assert torch.equal(draw(0, 50)[:, :3], start)
    assert torch.equal(draw(0, 50), draw(0, 50))
    assert not torch.equal(draw(0, 50), draw(1, 50))
    assert torch.equal(draw(0, 1), draw(1, 1))
