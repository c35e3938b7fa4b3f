"""Masks that nobody but flashlayer's attention function can take for something else.

transformers gives a mask to whatever attention a model has. flashlayer's masks are True where a key
is visible; a model with an attention of its own expects eager's, which are added to the scores, and
would compute with no mask or with its opposite. A :class:`GuardedMask` can be moved, sliced,
joined and combined with other bool masks, each result guarded in turn; every operation that reads
the values in another way raises.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flashlayer.spec import WindowSize


class Band(NamedTuple):
    """Which keys a query sees, in the terms of :func:`flashlayer.flash_attention`.

    Attributes:
        window: keys to the left and right of a query's own position; ``(None, 0)`` is causal.
        diagonal: where a query's own position is among the first ``keys`` keys.
        keys: how many keys there are to see: a static cache holds room for more.
        chunked: the packed sequences are chunks of longer ones.
    """

    window: WindowSize
    diagonal: Literal["bottom_right", "top_left"]
    keys: int
    chunked: bool = False


class Packing(NamedTuple):
    """Boundaries of packed sequences, as :func:`flashlayer.flash_attention_varlen` has them."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


_aten = torch.ops.aten

# Operations that move the values of a mask, or combine bool masks.
REARRANGING = {
    _aten.alias,
    _aten.as_strided,
    _aten.bitwise_and,
    _aten.bitwise_or,
    _aten.bitwise_not,
    _aten.cat,
    _aten.clone,
    _aten.expand,
    _aten.index,
    _aten.index_select,
    _aten.permute,
    _aten.repeat,
    _aten.select,
    _aten.slice,
    _aten.split,
    _aten.split_with_sizes,
    _aten.squeeze,
    _aten.stack,
    _aten.t,
    _aten.transpose,
    _aten.unbind,
    _aten.unfold,
    _aten.unsqueeze,
    _aten.view,
    _aten._unsafe_view,
    _aten._reshape_alias,
}

# Operations that make a tensor like a mask and don't look at its values.
SHAPED_LIKE = {
    _aten.empty_like,
    _aten.full_like,
    _aten.new_empty,
    _aten.new_full,
    _aten.new_ones,
    _aten.new_zeros,
    _aten.ones_like,
    _aten.rand_like,
    _aten.randn_like,
    _aten.zeros_like,
}


class GuardedMask(Tensor):
    """A bool mask, True = attend, that raises when it is read in another way.

    Attributes:
        owner: the type of the model that asked for the mask.
        inverted: True = hide: the model knows that the mask is bool, and may fill scores by it.
    """

    owner: str
    inverted: bool = False

    # Operations go to __torch_dispatch__ alone.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def dense(self) -> Tensor:
        """The mask as a plain bool tensor."""
        raise NotImplementedError

    def moved(self, device: torch.device | None) -> GuardedMask:
        """The same mask on another device."""
        raise NotImplementedError

    # Of a bool tensor these are no operations, so __torch_dispatch__ would not see them. Of eager's
    # mask they are True where a key is hidden.
    def bool(self, *_: Any, **__: Any) -> NoReturn:
        """Raise: eager's mask is not zero, which is True, where a key is hidden."""
        raise _misread(self.owner, "Tensor.bool")

    def tolist(self) -> NoReturn:
        """Raise, as every other reading."""
        raise _misread(self.owner, "Tensor.tolist")

    def numpy(self, *_: Any, **__: Any) -> NoReturn:
        """Raise, as every other reading."""
        raise _misread(self.owner, "Tensor.numpy")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Move the mask; raise for any dtype, see :meth:`bool`."""
        if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
            raise _misread(self.owner, "Tensor.to")
        return super().to(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run ``func`` on the dense mask and guard what comes out, or raise."""
        kwargs = {} if kwargs is None else kwargs
        masks = [x for x in tree_leaves((args, kwargs)) if isinstance(x, GuardedMask)]
        owner = masks[0].owner
        if func is _aten.detach.default:
            return args[0]
        if func is _aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            return args[0].moved(kwargs.get("device"))
        if func is _aten.clone.default and isinstance(args[0], BandMask):
            return args[0].moved(None)
        plain_args, plain_kwargs = tree_map_only(GuardedMask, _dense, (args, kwargs))
        if func.overloadpacket in SHAPED_LIKE or _known_as_bool(func, args):
            return func(*plain_args, **plain_kwargs)
        reduced = func.overloadpacket in (_aten.all, _aten.any) and args[0].inverted
        moved = func.overloadpacket in REARRANGING and not _read_as_index(func, args)
        if not (reduced or moved):
            raise _misread(owner, func)
        result = func(*plain_args, **plain_kwargs)
        if any(x.dtype != torch.bool for x in tree_leaves(result)):
            raise _misread(owner, func)
        inverted = all(mask.inverted for mask in masks) != (func is _aten.bitwise_not.default)
        return tree_map_only(Tensor, lambda x: DenseMask(x, owner, inverted), result)


def _dense(mask: GuardedMask) -> Tensor:
    return mask.dense()


def _read_as_index(func: Any, args: tuple) -> bool:
    """Whether a mask selects from another tensor."""
    return func.overloadpacket is _aten.index and not isinstance(args[0], GuardedMask)


def _known_as_bool(func: Any, args: tuple) -> bool:
    """Whether this is what bool masks are for: eager's mask would raise, being no bool tensor."""
    packet = func.overloadpacket
    guarded = [isinstance(argument, GuardedMask) for argument in args]
    if packet is _aten.where and guarded == [True, False, False]:
        return not args[0].inverted
    if packet is _aten.equal:  # torch.equal
        return args[0].dtype == args[1].dtype
    if packet in (_aten.masked_fill, _aten.masked_fill_) and guarded == [False, True, False]:
        return args[1].inverted
    return False


def _misread(owner: str, func: Any) -> ValueError:
    return ValueError(
        f"{owner}: the model's attention is its own, not flashlayer's ({func} takes the mask for "
        "something else than the keys to see): use attn_implementation='eager'"
    )


class DenseMask(GuardedMask):
    """A guarded mask of any shape whose values are stored.

    Attributes:
        visible: the plain bool tensor; of an inverted mask what is hidden.
    """

    visible: Tensor

    @staticmethod
    def __new__(cls, visible: Tensor, owner: str, inverted: bool = False) -> DenseMask:
        """A tensor of the shape and strides of ``visible`` without storage."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            visible.shape,
            strides=visible.stride(),
            storage_offset=visible.storage_offset(),
            dtype=torch.bool,
            device=visible.device,
        )

    def __init__(self, visible: Tensor, owner: str, inverted: bool = False) -> None:
        self.visible = visible
        self.owner = owner
        self.inverted = inverted

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """The shape; the values are ``repr(mask.dense())``."""
        return f"DenseMask(shape={tuple(self.shape)}, of {self.owner})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, bool]]:
        """The tensor within, by name, and what else it takes to make the mask again."""
        return ["visible"], (self.owner, self.inverted)

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], context: tuple[str, bool], size: Any, stride: Any
    ) -> DenseMask:
        """The inverse of :meth:`__tensor_flatten__`."""
        return DenseMask(tensors["visible"], *context)

    def dense(self) -> Tensor:
        """The mask as a plain bool tensor."""
        return self.visible

    def moved(self, device: torch.device | None) -> DenseMask:
        """The same mask on another device."""
        visible = self.visible.to(self.device if device is None else device)
        return DenseMask(visible, self.owner, self.inverted)


class BandMask(GuardedMask):
    """A bool mask ``(B, 1, Sq, Sk)``, True = attend, that is made only if somebody reads it.

    Until then it is a :class:`Band` and at most O(Sk) of tensors. Moving it to another device keeps
    that; every other operation that is allowed works on the dense mask.

    Attributes:
        padding: bool ``(B, band.keys)``, False for padding; None without any.
        cu_seqlens: boundaries of the sequences packed along ``B * Sq``; None for one a row.
        pattern: bool ``(B or 1, 1, Sq, Sk)``, what the band does not say; None if it says all.
    """

    padding: Tensor | None
    cu_seqlens: Tensor | None
    pattern: Tensor | None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: torch.device, *_: Any, **__: Any) -> BandMask:
        """A tensor of this shape without storage."""
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        band: Band,
        padding: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        anchor: Tensor | None = None,
        pattern: Tensor | None = None,
        packable: bool = False,
        owner: str = "model",
    ) -> None:
        # For a graph that makes or takes the mask: plain numbers, tensors, and at least one tensor.
        self.numbers: tuple[Any, ...] = (*band, max_seqlen, packable, owner)
        self.padding = padding
        self.cu_seqlens = cu_seqlens
        self.pattern = pattern
        self.anchor = torch.empty(0, device=device) if anchor is None else anchor

    @property
    def band(self) -> Band:
        """The geometry."""
        return Band(*self.numbers[:-3])

    @property
    def packable(self) -> bool:
        """Whether restarting positions count: no ``attention_mask``, and nobody has read them."""
        return self.numbers[-2]

    @property
    def owner(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The type of the model that asked for the mask."""
        return self.numbers[-1]

    @property
    def packing(self) -> Packing | None:
        """The packed sequences, None for one a row."""
        if self.cu_seqlens is None:
            return None
        return Packing(self.cu_seqlens, None, self.numbers[-3], self.numbers[-3])

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """The geometry; the dense mask is ``repr(mask.dense())``."""
        tensors = self.__tensor_flatten__()[0][1:]
        return f"BandMask(shape={tuple(self.shape)}, {self.band}, with {tensors})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        """The tensors within, by name, and what else it takes to make the mask again."""
        names = ["anchor", "padding", "cu_seqlens", "pattern"]
        return [name for name in names if getattr(self, name) is not None], self.numbers

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], numbers: tuple, size: Any, stride: Any
    ) -> BandMask:
        """The inverse of :meth:`__tensor_flatten__`."""
        *band, longest, packable, owner = numbers
        options: dict[str, Any] = {"max_seqlen": longest, "packable": packable, "owner": owner}
        options |= tensors
        return BandMask(size, tensors["anchor"].device, Band(*band), **options)

    def separated(self, position_ids: Tensor | None, causal: bool) -> Tensor:
        """The mask with a sequence of its own from each restart of the positions ``(B, S)`` on.

        Causal masks only, without a past and without an ``attention_mask``. Restarts are read once
        for each mask: reading waits for the GPU, and the layers share a mask. A graph and a meta
        tensor can't be read; there the mask becomes dense.
        """
        if position_ids is None or position_ids.ndim != 2 or not self.packable:
            return self
        batch, _, q_length, kv_length = self.shape
        without_past = q_length == kv_length == self.band.keys == position_ids.shape[-1] > 1
        causal = causal if self.pattern is not None else self.band.window[1] == 0
        told = self.cu_seqlens is not None and not self.band.chunked
        if not without_past or not causal or told:
            return self
        sequences = _restarted(position_ids).expand(batch, -1)
        if not readable(sequences):
            return self.dense() & _same(sequences)
        longest = self.numbers[-3]
        if bool(sequences.any()):
            if self.cu_seqlens is not None:
                # Both only rise along a row, so their sum changes where either does.
                sequences = sequences + self._sequences(self.cu_seqlens)
            self.cu_seqlens, longest = boundaries(sequences)
        self.numbers = (*self.band, longest, False, self.owner)
        return self

    def dense(self) -> Tensor:
        """The mask as a plain tensor, bool ``(B, 1, Sq, Sk)``."""
        batch, _, q_length, kv_length = self.shape
        band = self.band
        offset = band.keys - q_length if band.diagonal == "bottom_right" else 0
        query = torch.arange(q_length, device=self.device)[:, None]
        key = torch.arange(kv_length, device=self.device)
        mask = (key < band.keys).expand(q_length, -1)
        left, right = band.window
        if left is not None:
            mask = mask & (key >= query + offset - left)
        if right is not None:
            mask = mask & (key <= query + offset + right)
        mask = mask.expand(batch, 1, -1, -1)
        if self.padding is not None:
            padding = nn.functional.pad(self.padding, (0, kv_length - band.keys))
            mask = mask & padding[:, None, None, :]
        if self.cu_seqlens is not None:
            mask = mask & _same(self._sequences(self.cu_seqlens))
        return mask if self.pattern is None else mask & self.pattern

    def _sequences(self, cu_seqlens: Tensor) -> Tensor:
        """Numbers ``(B, S)`` of the packed sequences."""
        batch, _, length, _ = self.shape
        token = torch.arange(batch * length, device=self.device)
        return torch.bucketize(token, cu_seqlens, right=True).view(batch, length)

    def moved(self, device: torch.device | None) -> BandMask:
        """The same mask on another device, its band still a band."""
        device = self.device if device is None else device
        names, numbers = self.__tensor_flatten__()
        tensors = {name: getattr(self, name).to(device) for name in names}
        return self.__tensor_unflatten__(tensors, numbers, self.shape, self.stride())


# Modes under which a tensor may have no values, or values that a graph must not depend on.
_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at the values.

    Not while a graph is made of the model, be it by torch.compile, make_fx or torch.jit.trace, and
    not of meta, fake and functional tensors nor inside torch.vmap.
    """
    if torch.compiler.is_compiling():
        return False
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    if torch._is_functional_tensor(tensor):  # pyright: ignore[reportPrivateImportUsage]
        return False
    if torch._C._get_tracing_state() is not None or is_batchedtensor(tensor):
        return False
    return all(torch._C._get_dispatch_mode(mode) is None for mode in _TRACING_MODES)


def _restarted(position_ids: Tensor) -> Tensor:
    """Numbers ``(B, S)`` of the sequences that restarting positions begin; gaps begin none.

    A position lower than the one before begins a sequence. So does a repeated 0, after a sequence
    of one token, unless other positions repeat in the row, too, or all are 0.
    """
    step = position_ids.diff(dim=-1)
    zero = position_ids[:, 1:] == 0
    repeat = step == 0
    repeats_mean_nothing = (repeat & ~zero).any(-1, keepdim=True) | zero.all(-1, keepdim=True)
    begins = (step < 0) | (repeat & zero & ~repeats_mean_nothing)
    return nn.functional.pad(begins.cumsum(-1), (1, 0))


def _same(sequences: Tensor) -> Tensor:
    """Bool ``(B, 1, S, S)``: whether two tokens are of the same sequence."""
    return (sequences[:, :, None] == sequences[:, None, :])[:, None]


def boundaries(sequences: Tensor) -> tuple[Tensor, int]:
    """``cu_seqlens`` of the sequences that ``(B, S)`` numbers, and the length of the longest.

    Each row begins a new one.
    """
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences.diff(dim=-1) != 0
    begins = begins.flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(begins, (0, 1), value=sequences.numel())
    return cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max())
