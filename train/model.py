"""A GPT in one file, after GPT-2 and nanoGPT; its attention is chosen by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashlayer import flash_attention
from train import UsageError
from train.running.parallel import SequenceShard

Attention = Callable[..., Any]  # q, k, v (B, H, S, D) -> out (B, H, S, D)


def control_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Standard causal attention with every sum over keys or queries taken in the opposite order.

    With queries, keys and values flipped, "query i sees keys j <= i" becomes "j >= i". The result
    is the same but for rounding, so the gap between this and ``standard`` is what rounding makes.
    """
    mirrored: Any = flash_attention(
        q.flip(2),
        k.flip(2),
        v.flip(2),
        window_size=(0, None),
        diagonal="top_left",
        backend="standard",
    )
    return mirrored.flip(2)


# The attentions that are flashlayer's, and their backends.
BACKENDS = {
    "flash": "auto",
    **{name: name for name in ("standard", "tiled", "aten", "triton")},
}

# Every attention a GPT can be built with: causal, by name.
ATTENTIONS: dict[str, Attention] = {
    **{
        name: partial(flash_attention, causal=True, backend=backend)
        for name, backend in BACKENDS.items()
    },
    "control": control_attention,
    "sdpa": partial(F.scaled_dot_product_attention, is_causal=True),
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Attributes:
        vocab_size: number of tokens; set from the tokenizer.
        context: longest sequence, in tokens.
        n_layer: number of blocks.
        n_head: attention heads per block; divides ``n_embd``.
        n_embd: width of the residual stream.
        attention: a name in ``ATTENTIONS``.
    """

    vocab_size: int = 257
    context: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    attention: str = "flash"

    def __post_init__(self) -> None:
        """Refuse what no model can be built from."""
        for name in ("vocab_size", "context", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise UsageError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.attention not in ATTENTIONS:
            raise UsageError(
                f"unknown attention {self.attention!r}: choose one of {', '.join(ATTENTIONS)}"
            )


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention around the attention function that the config names."""

    def __init__(self, config: GPTConfig) -> None:
        """Fused q, k, v projection and output projection."""
        super().__init__()
        self.n_head = config.n_head
        self.attend = ATTENTIONS[config.attention]
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, S, C) -> (B, S, C)``."""
        # Views with strides, never copies: the attention reads them where the projection wrote
        # them.
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (B, S, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, S, D) each
        out = self.attend(q, k, v)  # (B, H, S, D)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        """Two norms, attention, and an MLP four times as wide as the stream."""
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.ModuleDict(
            {
                "up": nn.Linear(config.n_embd, 4 * config.n_embd),
                "proj": nn.Linear(4 * config.n_embd, config.n_embd),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, S, C) -> (B, S, C)``."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp["proj"](F.gelu(self.mlp["up"](self.norm2(x))))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the model; torch's generator draws its weights, alike for every attention."""
        super().__init__()
        self.config = config
        self.shard: SequenceShard | None = None
        self.recompute_blocks = False
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self._init_weights()

    def _init_weights(self) -> None:
        """GPT-2's: N(0, 0.02), smaller where 2 * n_layer branches add up in the stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                branches = 2 * self.config.n_layer if name.endswith("proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(branches))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def shard_sequences(self, shard: SequenceShard) -> None:
        """From now on this rank computes its part of every sequence only."""
        self.shard = shard
        attend = partial(shard.attend, causal=True, backend=BACKENDS[self.config.attention])
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                module.attend = attend

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids ``(B, S)`` to logits ``(B, S, vocab_size)`` for the token that follows each.

        With sharded sequences both are this rank's part.
        """
        x = self.tokens(tokens) + self._embedded_positions(tokens)  # (B, S, C)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute_blocks else block(x)
        return self.head(self.norm(x))

    def _embedded_positions(self, tokens: Tensor) -> Tensor:
        """``(S, C)``."""
        length = tokens.shape[1]
        if self.shard is None:
            return self.positions.weight[:length]
        return self.positions(self.shard.positions(length, tokens.device))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of predicting ``tokens[:, 1:]`` from ``tokens[:, :-1]``.

        With sharded sequences the mean is over this rank's part, which is as long as every other's.
        """
        inputs, targets = self.part(tokens[:, :-1]), self.part(tokens[:, 1:])
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def part(self, tokens: Tensor) -> Tensor:
        """``(B, T) -> (B, S)``: this rank's part of sequences that are sharded, else all."""
        return tokens if self.shard is None else self.shard.take(tokens)

    @torch.inference_mode()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        temperature: float,
        top_k: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Extend ``tokens`` ``(B, S)`` by ``count`` of the ``top_k`` most likely each."""
        for _ in range(count):
            logits = self(tokens[:, -self.config.context :])[:, -1] / temperature  # (B, vocab_size)
            best, indices = logits.topk(min(top_k, logits.shape[-1]))
            choice = torch.multinomial(best.softmax(-1), 1, generator=generator)  # (B, 1)
            tokens = torch.cat([tokens, indices.gather(-1, choice)], dim=1)
        return tokens
