"""``nn.MultiheadAttention`` computed by flash attention, with the same interface."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashlayer import backends
from flashlayer.functional import flash_attention
from flashlayer.integrations.weights import attention_weights
from flashlayer.masks import IntervalMask
from flashlayer.modules.tracing import Leaf, check_tensor

# torch's check of the shapes: returns whether there is a batch dimension.
_shape_check = vars(F)["_mha_shape_check"]


# nn.MultiheadAttention raises AssertionError for some wrong calls and RuntimeError for others, this
# library ValueError and TypeError. These are both, so callers can catch either.
class _AssertedShape(ValueError, AssertionError):
    pass


class _FailedShape(ValueError, RuntimeError):
    pass


class _AssertedDtype(TypeError, AssertionError):
    pass


def _no_op_hook(module: nn.Module, inputs: Any) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from its fused path.

    In inference the layer passes the parameters of ``self_attn`` to a fused kernel without calling
    the module, unless the module has a hook.
    """


class FlashMultiheadAttention(Leaf, nn.MultiheadAttention):
    r"""``nn.MultiheadAttention`` that never stores the ``L x S`` scores.

    Constructor, ``forward``, ``state_dict``, initialisation and results are those of
    :class:`torch.nn.MultiheadAttention`, whose documentation describes the arguments; a checkpoint
    of either loads into the other. Differences:

    - ``need_weights=True`` computes the weights from the log-sum-exp, a block of queries at a time,
      and recomputes them in the backward pass: averaged over heads they take twice their own size
      and one block, never ``H`` times it.
    - A query without a visible key gives 0, as in the fused kernels of SDPA, and weights of 0;
      torch gives NaN with ``need_weights=True``.
    - ``is_causal=True`` needs no ``attn_mask``. With one it is a hint, as in torch: the mask is
      taken to be the (top-left) causal one, and not read if the hint suffices.
    - Masks may have different dtypes, and are not expanded over heads.
    - Nested tensors are accepted where torch accepts them: for self-attention in inference, with
      ``batch_first`` and without masks. Elsewhere pass a padded batch with ``key_padding_mask``.
    - There is no fused path for inference, and a ``TransformerEncoderLayer`` around it does not
      take its own: a forward pre-hook makes it call this module.
    - ``torch.jit.script`` can't compile it; ``torch.compile``, ``torch.export`` and
      ``torch.jit.trace`` can.

    The one argument more is ``backend``, as in :func:`flashlayer.flash_attention`.

    Example:
        >>> attention = FlashMultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 100, 64)
        >>> out, weights = attention(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([2, 100, 64]), torch.Size([2, 100, 100]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        backends.check_name(backend)
        extra_keys = (add_bias_kv, add_zero_attn)
        features = (kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, dropout, bias, *extra_keys, *features)
        self._become_flash(backend)

    def _become_flash(self, backend: str) -> None:
        """Set up what an ``nn.MultiheadAttention`` lacks besides its class."""
        self.backend = backend
        self.register_forward_pre_hook(_no_op_hook)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`, with its arguments.

        ``query`` is ``(L, N, E)``, ``key`` ``(S, N, kdim)`` and ``value`` ``(S, N, vdim)``; ``N``
        is first with ``batch_first``, and absent without a batch. ``key_padding_mask`` ``(N, S)``
        or ``(S,)`` and ``attn_mask`` ``(L, S)`` or ``(N * H, L, S)`` are bool (True = hidden) or
        floating (added). ``attn_mask`` may be left out with ``is_causal``.

        Returns:
            The output, of ``query``'s shape, and the weights after dropout, ``(N, L, S)``, ``(N, H,
            L, S)`` if not averaged, without ``N`` if there is no batch; None if not needed.
            ``add_bias_kv`` and ``add_zero_attn`` add one key each to ``S``.

        Raises:
            TypeError: a mask is neither bool nor floating.
            ValueError: a shape does not fit, or an input is a nested tensor that torch rejects too.
                Both are also the AssertionError or RuntimeError that torch's module raises.
        """
        packed = query is key and key is value
        if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
            reason = "query, key and value are not the same tensor"
            if packed:
                reason = self._why_not_nested(query, attn_mask, key_padding_mask)
            if reason is not None:
                raise _AssertedShape(
                    "MultiheadAttention does not support NestedTensor outside of its fast path, "
                    f"and FlashMultiheadAttention takes its place only there: {reason}; pass a "
                    "padded batch with key_padding_mask"
                )
            return self._forward_nested(query, need_weights, average_attn_weights, is_causal)
        batched = self._check_inputs((query, key, value), attn_mask, key_padding_mask)
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        batch, seqlen_q, seqlen_k = *query.shape[:2], key.shape[1]
        shapes = (seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k)
        _check_mask("attn_mask", attn_mask, shapes, _FailedShape)
        _check_mask("key_padding_mask", key_padding_mask, ((batch, seqlen_k),), _AssertedShape)
        q, k, v = self._project(query, key, value, packed)  # [N, L, E], [N, S, E]
        extra_keys = k.shape[1] - seqlen_k
        causal = is_causal and (
            attn_mask is None
            or (key_padding_mask is None and not need_weights)  # as torch does
            or (extra_keys == 0 and seqlen_q == seqlen_k)
        )
        mask = _merge_masks(
            None if causal else _attend_mask(attn_mask, self.num_heads),
            None if key_padding_mask is None else _attend_mask(key_padding_mask[:, None, None], 1),
            extra_keys,
        )
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [N, H, L, D]
        options: dict[str, Any] = {"attn_mask": mask, "causal": causal, "dropout_p": 0.0}
        if self.training and self.dropout > 0:
            options["dropout_p"] = self.dropout
            if need_weights:  # the weights need the output's dropout mask
                options["dropout_seed"] = torch.randint(2**63 - 1, (), device=q.device)
        result = flash_attention(
            q, k, v, diagonal="top_left", return_lse=need_weights, backend=self.backend, **options
        )
        out, lse = result if isinstance(result, tuple) else (result, None)
        out = out.transpose(1, 2).flatten(2)  # [N, L, E]
        if batched and not self.batch_first:
            out = out.transpose(0, 1).contiguous()
        out = self.out_proj(out if batched else out.squeeze(0))
        if lse is None:
            return out, None
        weights = attention_weights(q, k, lse, average=average_attn_weights, **options)
        return out, weights if batched else weights.squeeze(0)

    def _why_not_nested(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> str | None:
        if x.layout != torch.strided:
            return "it has the jagged layout"
        if x.dim() != 3:
            return f"it has {x.dim()} dimensions and not 3"
        if not self.batch_first:
            return "batch_first is False"
        if attn_mask is not None or key_padding_mask is not None:
            return "attn_mask or key_padding_mask is given besides"
        if torch.is_grad_enabled() and any(y.requires_grad for y in (x, *self.parameters())):
            return "grad is enabled and at least one of query, weights or biases requires_grad"
        return None

    def _forward_nested(
        self, x: Tensor, need_weights: bool, average: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of sequences of different lengths: pad, attend, nest again."""
        if x.numel() == 0:  # torch can't pad it
            shape = [x.size(0), *([] if average else [self.num_heads]), 0, 0]
            return x, torch.zeros(shape, dtype=x.dtype, device=x.device) if need_weights else None
        lengths = torch.tensor([len(sequence) for sequence in x.unbind()], device=x.device)
        padded = torch.nested.to_padded_tensor(x, 0.0)  # [N, L, E]
        token = torch.arange(padded.shape[1], device=x.device) < lengths[:, None]  # [N, L]
        options: dict[str, Any] = {"average_attn_weights": average, "is_causal": is_causal}
        out, weights = self.forward(padded, padded, padded, ~token, need_weights, **options)
        # As torch's TransformerEncoder converts back; it has no gradient.
        nested: Tensor = vars(torch)["_nested_tensor_from_mask"](out, token, mask_check=False)
        return nested, weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, packed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, and the keys and values that the options append."""
        bias = self.in_proj_bias
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        if bias is not None and weight is not None:
            bias = bias.to(weight.dtype)  # some models keep their biases in another dtype
        if packed and self.in_proj_weight is not None:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = map(F.linear, (query, key, value), weights, biases)
        for name, features in (("query", q), ("key", k), ("value", v)):
            if features.shape[-1] != self.embed_dim:
                raise _FailedShape(
                    f"the projection of {name} must make embed_dim={self.embed_dim} features, got "
                    f"{features.shape[-1]}: FlashAttention's heads can be sharded, these can't"
                )
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.expand(len(k), 1, -1)), dim=1)
            v = torch.cat((v, self.bias_v.expand(len(v), 1, -1)), dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return q, k, v

    def _check_inputs(
        self, inputs: tuple[Tensor, ...], attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> bool:
        """Whether the inputs have a batch dimension."""
        names = ("query", "key", "value")
        for name, x in zip(names, inputs, strict=True):
            check_tensor(name, x, "module")
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if isinstance(mask, IntervalMask):
                raise _AssertedDtype(
                    f"{name} must be a tensor, as in nn.MultiheadAttention, whose True hides: got "
                    "an IntervalMask, which says who may attend: FlashAttention takes it"
                )
        try:
            batched = _shape_check(*inputs, key_padding_mask, attn_mask, self.num_heads)
        except AssertionError as error:
            raise _AssertedShape(str(error)) from None
        query, key, value = (tuple(x.shape) for x in inputs)
        expected = (self.embed_dim, self.kdim, self.vdim)
        for name, shape, features in zip(names, (query, key, value), expected, strict=True):
            if shape[-1] != features:
                raise _AssertedShape(f"{name} must have {features} features, got shape {shape}")
        if key[:-1] != value[:-1]:
            raise _AssertedShape(
                f"key and value must agree in length and batch, got {key} and {value}"
            )
        batch_dim = 0 if self.batch_first else 1
        if batched and query[batch_dim] != key[batch_dim]:
            raise _FailedShape(f"query and key must have one batch size, got {query} and {key}")
        return batched


def _check_mask(
    name: str, mask: Tensor | None, shapes: tuple[tuple[int, ...], ...], error: type[Exception]
) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise _AssertedDtype(f"{name} must be bool or floating, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise error(f"{name} must be {expected}, got {tuple(mask.shape)}")


def _attend_mask(mask: Tensor | None, heads: int) -> Tensor | None:
    """A bool mask inverted to True = attend, and ``(N * H, L, S)`` unflattened."""
    if mask is None:
        return None
    if mask.ndim == 3:
        mask = mask.unflatten(0, (len(mask) // heads, heads))
    return ~mask if mask.dtype == torch.bool else mask


def _merge_masks(
    attn_mask: Tensor | None, padding: Tensor | None, extra_keys: int
) -> Tensor | None:
    """Both masks as one, with the appended keys visible."""
    if attn_mask is None or padding is None:
        merged = padding if attn_mask is None else attn_mask
    elif attn_mask.dtype == padding.dtype == torch.bool:
        merged = attn_mask & padding
    elif attn_mask.dtype == torch.bool:
        merged = torch.where(attn_mask, padding, -torch.inf)
    elif padding.dtype == torch.bool:
        merged = torch.where(padding, attn_mask, -torch.inf)
    else:
        merged = attn_mask + padding
    if merged is None or extra_keys == 0:
        return merged
    return F.pad(merged, (0, extra_keys), value=merged.dtype == torch.bool)
