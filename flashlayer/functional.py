"""The public functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor
from torch.overrides import handle_torch_function

from flashlayer import backends, plans
from flashlayer.autograd import attend
from flashlayer.auxiliary import AuxOutput, AuxRequest, as_output, as_request
from flashlayer.masks import IntervalMask
from flashlayer.philox import dropout_keep_mask as dropout_keep_mask
from flashlayer.problem import (
    Packing,
    build_packed_problem,
    build_problem,
    problem_of_options,
    stand_ins,
)
from flashlayer.spec import Diagonal, Problem, WindowSize

if TYPE_CHECKING:
    from typing import Unpack

    from flashlayer.spec import DenseOptions, PackedOptions


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Tensor: ...
@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_aux: AuxRequest,
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, AuxOutput]: ...
@overload
def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool, **options: Unpack[DenseOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | IntervalMask | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    diagonal: Diagonal = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    r"""Exact softmax attention that never stores the ``Sq x Sk`` matrix.

    For every batch entry and query head ``h``, with kv head ``h // (H // Hkv)``, over the keys j
    visible to query i::

        score[i, j] = softcap(scale * q[i] . k[j]) - slope * |i + offset - j| + mask[i, j]
        lse[i]      = log(sum_j exp(score[i, j]) + exp(sink))
        out[i]      = sum_j dropout(exp(score[i, j] - lse[i])) v[j]

    The probabilities are built block by block with the online softmax (Milakov & Gimelshein, arXiv
    1805.02867) and recomputed from ``lse`` in the backward pass (Dao, "FlashAttention-2", arXiv
    2307.08691, section 3.1), so memory is O(Sq + Sk). A query without a visible key gives
    ``out = 0``, ``lse = -inf`` (the sink where there is one) and zero gradients.

    Args:
        query: ``(B, H, Sq, D)``; fp16, bf16, fp32 or fp64, any strides. ``Sq`` may be 0.
        key: ``(B, Hkv, Sk, D)``, same dtype and device. ``H`` must be a multiple of ``Hkv`` (GQA;
            ``Hkv = 1`` is MQA).
        value: ``(B, Hkv, Sk, Dv)``; ``Dv`` may differ from ``D``.
        attn_mask: bool (True = attend) or floating (added to the scores, differentiable),
            broadcastable to ``(B, H, Sq, Sk)`` and never expanded: a ``(B, 1, 1, Sk)`` padding mask
            costs O(Sk). An entry of -inf hides its key like False. Or an O(Sk)
            :class:`flashlayer.masks.IntervalMask`, whose hidden tiles are skipped.
        causal: key ``j`` is visible to query ``i`` only when ``j <= i + offset``.
        window_size: ``(left, right)``: keys from ``i + offset - left`` to ``i + offset + right``
            inclusive are visible to query ``i``. None is unbounded; its own position is not
            counted; ``causal`` caps ``right`` at 0.
        diagonal: ``offset`` is ``Sk - Sq`` for ``"bottom_right"`` (flash_attn's), 0 for
            ``"top_left"`` (SDPA's).
        scale: factor on the scores; ``D ** -0.5`` if None.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118,
            section 2); None is off.
        alibi_slopes: ``(H,)`` or ``(B, H)``, floating; used in fp32 and without a gradient (ALiBi,
            Press et al., arXiv 2108.12409).
        sinks: ``(H,)``, floating, differentiable: a logit per head that joins the denominator only
            (attention sinks, Xiao et al., arXiv 2309.17453, in the learned form of gpt-oss).
        dropout_p: probability, 0 to 1, that an attention weight is zeroed; the rest are divided by
            ``1 - dropout_p``. Which ones depends on the seed and the position only
            (:func:`dropout_keep_mask`): the same in both passes and in every backend.
        dropout_seed: the seed, an int or a ``()`` int64 tensor, which is not read on the host; if
            None it is drawn from torch's generator of the device, so that ``torch.manual_seed``
            reproduces it and every call draws another.
        return_lse: also return the log-sum-exp of the scores.
        return_aux: also return an :class:`AuxOutput` of what this :class:`AuxRequest`, or
            FlexAttention's, asks for: ``lse``, ``max_scores``, ``entropy``.
        backend: ``"auto"``, or one of ``"triton"``, ``"aten"``, ``"tiled"``, ``"standard"``, see
            :func:`available_backends`. ``"auto"`` takes Triton on a GPU; on the CPU ATen's flash
            kernel where it covers the call and is the faster one, else the tiled algorithm in
            PyTorch.

    Returns:
        ``out`` ``(B, H, Sq, Dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse``
        ``(B, H, Sq)``: natural logarithm, contiguous, fp32 (fp64 for fp64 inputs), differentiable.
        With ``return_aux``: ``(out, AuxOutput)``.

    Raises:
        TypeError: an argument is of the wrong type, or the dtypes differ.
        ValueError: a shape, device or option does not fit, or the asked-for backend can't compute
            this call.

    Under ``torch.autocast`` fp32 inputs are computed in the autocast dtype, as SDPA does.

    Example:
        >>> q = torch.randn(2, 8, 1024, 64, requires_grad=True)
        >>> k, v = torch.randn(2, 2, 2, 1024, 64).unbind(0)  # 2 kv heads for 8 query heads
        >>> out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 8, 1024, 64]), torch.Size([2, 8, 1024]))
    """
    signature = None
    if (
        alibi_slopes is sinks is dropout_seed is return_aux is None
        and type(dropout_p) is float
        and dropout_p == 0.0
    ):
        signature = plans.signature(
            query, key, value, causal, window_size, diagonal, scale, softcap, backend, attn_mask
        )
        planned = plans.find(signature, query, key, value, attn_mask)
        if planned is not None:
            return _compute(*planned, return_lse)
    options: dict[str, Any] = {
        "attn_mask": attn_mask,
        "causal": causal,
        "window_size": window_size,
        "diagonal": diagonal,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "return_aux": return_aux,
    }
    if proxies := stand_ins(query, key, value, **options):
        options |= {"return_lse": return_lse, "backend": backend}
        return handle_torch_function(flash_attention, proxies, query, key, value, **options)
    if return_aux is not None:
        options["return_aux"] = return_aux = as_request(return_aux, return_lse)
    problem = build_problem(query, key, value, **options)
    chosen = backends.select(backend, problem)
    uncast = problem.query is query and problem.key is key and problem.value is value
    if signature is not None and uncast:  # a plan records no casts to the autocast dtype
        plans.store(signature, problem.spec, chosen)
    return _compute(chosen, problem, return_lse, return_aux)


@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PackedOptions],
) -> Tensor: ...
@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_aux: AuxRequest,
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, AuxOutput]: ...
@overload
def flash_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool, **options: Unpack[PackedOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    diagonal: Diagonal = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Attention over sequences packed one after the other, without padding.

    Sequence ``n`` is the tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``; only its own keys are
    visible to its queries, with positions counted from its start. It may be empty on either side.
    Tokens past ``cu_seqlens[-1]`` give zeros (``lse`` -inf) and receive zero gradients.

    Args:
        query: ``(Tq, H, D)``.
        key: ``(Tk, Hkv, D)``.
        value: ``(Tk, Hkv, Dv)``.
        cu_seqlens_q: ``(N + 1,)``, int32 or int64, on query's device: 0 and the running sum of the
            query lengths.
        cu_seqlens_k: the same of the key lengths; ``cu_seqlens_q`` if None.
        max_seqlen_q: the longest query sequence, or more. Read from ``cu_seqlens_q`` if None, which
            waits for the GPU.
        max_seqlen_k: the longest key sequence, or more.
        causal: as in :func:`flash_attention`, within each sequence.
        window_size: likewise.
        diagonal: likewise; ``offset`` is that of each sequence.
        scale: as in :func:`flash_attention`.
        softcap: likewise.
        alibi_slopes: ``(H,)`` or ``(N, H)``.
        sinks: ``(H,)``.
        dropout_p: as in :func:`flash_attention`; the batch index of the mask is the sequence's.
        dropout_seed: likewise.
        return_lse: also return the log-sum-exp.
        return_aux: as in :func:`flash_attention`.
        backend: as in :func:`flash_attention`.

    Returns:
        ``out`` ``(Tq, H, Dv)``; with ``return_lse`` also ``lse`` ``(H, Tq)``.

    Raises:
        TypeError: as :func:`flash_attention`.
        ValueError: likewise.

    Example:
        >>> qkv = torch.randn(3, 30, 4, 16)
        >>> cu_seqlens = torch.tensor([0, 10, 10, 30])  # 10 tokens, none, 20
        >>> flash_attention_varlen(*qkv, cu_seqlens_q=cu_seqlens, causal=True).shape
        torch.Size([30, 4, 16])
    """
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": window_size,
        "diagonal": diagonal,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "return_aux": return_aux,
    }
    if proxies := stand_ins(query, key, value, *packing, **options):
        options |= {**packing._asdict(), "return_lse": return_lse, "backend": backend}
        return handle_torch_function(flash_attention_varlen, proxies, query, key, value, **options)
    if return_aux is not None:
        options["return_aux"] = return_aux = as_request(return_aux, return_lse)
    problem = build_packed_problem(query, key, value, packing, **options)
    result = _compute(backends.select(backend, problem), problem, return_lse, return_aux)
    if return_aux is not None:
        out, aux = result
        aux = AuxOutput(*(None if x is None else x.squeeze(0) for x in aux))
        return out.squeeze(0).transpose(0, 1), aux
    if not return_lse:
        return result.squeeze(0).transpose(0, 1)
    out, lse = result
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)


def _compute(
    backend: Any, problem: Problem, return_lse: bool, request: AuxRequest | None = None
) -> Any:
    if backend.backward is None:  # differentiated by PyTorch's autograd
        out, lse, *more = backend.forward(*problem, return_lse or request is not None)
    else:
        out, lse, *more = attend(backend, backends.tiled, problem)
    if request is not None:
        return out, as_output(request, lse, more)
    # Make lse contiguous only if asked for.
    return (out, lse.contiguous()) if return_lse else out


def available_backends(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> dict[str, str | None]:
    """Which backends can compute this call: ``{name: None, or the reason it refuses}``.

    Args:
        query: ``(B, H, Sq, D)``.
        key: ``(B, Hkv, Sk, D)``.
        value: ``(B, Hkv, Sk, Dv)``.
        **options: those of :func:`flash_attention`; ``return_lse`` and ``backend`` make no
            difference.

    Raises:
        TypeError: as :func:`flash_attention`, and for an option it doesn't have.
        ValueError: as :func:`flash_attention`.

    Example:
        >>> q = k = v = torch.randn(1, 4, 16, 64)
        >>> available_backends(q, k, v, causal=True)["tiled"] is None
        True
    """
    problem = problem_of_options("available_backends", query, key, value, options)
    return {name: backend.refuses(problem) for name, backend in backends.BACKENDS.items()}
