"""Bool masks that raise when a model uses them as anything else.

transformers passes our mask to every model, also to one with its own attention, which expects
eager's additive mask: adding a bool mask hides nothing, "hide where nonzero" inverts it. A
:class:`GuardedMask` can be moved, sliced, joined and combined with other bool masks, and the result
is guarded too; every operation that interprets the values otherwise raises.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from flashlayer.integrations.transformers.packing import (
    boundaries,
    readable,
    restarts,
    same_sequence,
)
from flashlayer.masks.builders import runs
from flashlayer.masks.intervals import visible_pairs
from flashlayer.problem import Packing
from flashlayer.spec import WindowSize


class Window(NamedTuple):
    """What a mask is besides its tensors, in the terms of :func:`flashlayer.flash_attention`."""

    window_size: WindowSize
    diagonal: Literal["bottom_right", "top_left"]  # of the queries and the keys in use
    owner: str = "model"  # type of the model
    max_seqlen: int | None = None  # of the packed sequences
    packable: bool = False  # no attention_mask, and WindowMask.separated was not applied yet

    def options(self) -> dict[str, Any]:
        """As arguments; the keys that are not in use are to be cut off."""
        return {"window_size": self.window_size, "diagonal": self.diagonal}


_aten = torch.ops.aten

# fmt: off
# Operations that move the values of a mask, or combine bool masks.
REARRANGING = {
    _aten.alias, _aten.as_strided, _aten.bitwise_and, _aten.bitwise_or, _aten.bitwise_not,
    _aten.cat, _aten.clone, _aten.expand, _aten.index, _aten.index_select, _aten.permute,
    _aten.repeat, _aten.select, _aten.slice, _aten.split, _aten.split_with_sizes, _aten.squeeze,
    _aten.stack, _aten.t, _aten.transpose, _aten.unbind, _aten.unfold, _aten.unsqueeze,
    _aten.view, _aten._unsafe_view, _aten._reshape_alias,
}
# Operations that read only shape, dtype and device.
SHAPED_LIKE = {
    _aten.empty_like, _aten.full_like, _aten.new_empty, _aten.new_full, _aten.new_ones,
    _aten.new_zeros, _aten.ones_like, _aten.rand_like, _aten.randn_like, _aten.zeros_like,
}
# fmt: on


def _refusing(name: str) -> Any:
    """A method that raises, as the values are read."""

    def method(self: GuardedMask, *_: Any, **__: Any) -> NoReturn:
        raise _misread(self.owner, f"Tensor.{name}")

    return method


class GuardedMask(Tensor):
    """A bool mask, True = attend, that raises when it is used as another kind of mask."""

    owner: str  # type of the model that the mask is for, named in errors
    inverted: bool = False  # True = hide, after ~: the model treats it as bool and may fill by it

    # Only __torch_dispatch__ handles operations.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def dense(self) -> Tensor:
        """The mask as a plain bool tensor."""
        raise NotImplementedError

    def moved(self: Any, device: torch.device | None) -> Tensor:
        """The same mask on another device, not materialized."""
        names, context = self.__tensor_flatten__()
        device = self.device if device is None else device
        tensors = {name: getattr(self, name).to(device) for name in names}
        return self.__tensor_unflatten__(tensors, context, self.shape, self.stride())

    # For a bool tensor these do not dispatch, so __torch_dispatch__ would miss them. Of eager's
    # mask, which is nonzero where a key is hidden, bool() is the inverse.
    bool = _refusing("bool")
    tolist = _refusing("tolist")
    numpy = _refusing("numpy")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Move the mask; raise for any dtype, also bool."""
        if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
            raise _misread(self.owner, "Tensor.to")
        return super().to(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run ``func`` on the dense mask and guard the result, or raise."""
        kwargs = {} if kwargs is None else kwargs
        masks = [x for x in tree_leaves((args, kwargs)) if isinstance(x, GuardedMask)]
        owner = masks[0].owner
        if func is _aten.detach.default:
            return args[0]
        if func is _aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            return args[0].moved(kwargs.get("device"))
        if func is _aten.clone.default and isinstance(args[0], WindowMask):
            return args[0].moved(None)
        plain = tree_map_only(GuardedMask, lambda mask: mask.dense(), (args, kwargs))
        packet = func.overloadpacket
        if packet in SHAPED_LIKE or _known_as_bool(packet, args):
            return func(*plain[0], **plain[1])
        reduced = packet in (_aten.all, _aten.any) and args[0].inverted
        selecting = packet is _aten.index and not isinstance(args[0], GuardedMask)
        if not reduced and (selecting or packet not in REARRANGING):
            raise _misread(owner, func)
        result = func(*plain[0], **plain[1])
        if any(x.dtype != torch.bool for x in tree_leaves(result)):
            raise _misread(owner, func)
        inverted = all(mask.inverted for mask in masks) != (func is _aten.bitwise_not.default)
        return tree_map_only(Tensor, lambda x: DenseMask(x, owner, inverted), result)


def _known_as_bool(packet: Any, args: tuple) -> bool:
    """Whether only a bool mask can be used so: the operation would raise for eager's mask."""
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
    """A guarded mask of any shape whose values are stored."""

    visible: Tensor  # bool; True = hidden if the mask is inverted

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
        """The inner tensor's name, and the rest of the constructor's arguments."""
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


def keys_in_use(mask: WindowMask) -> int:
    """How many keys, from the first on, are in use; in a static cache fewer than its capacity.

    A function, because Dynamo can't trace a property whose value varies from call to call.
    """
    return mask.anchor.shape[1]


class WindowMask(GuardedMask):
    """A bool mask ``(B, 1, Sq, Sk)``, True = attend, that is materialized only when it is read.

    Until then it is a :class:`Window` and O(Sk) of tensors. Moving it to another device keeps it
    so; every other allowed operation materializes it.
    """

    padding: Tensor | None  # bool (B, keys in use), False for padding
    cu_seqlens: Tensor | None  # boundaries of the sequences packed along B * Sq; None: one a row
    intervals: Tensor | None  # int32 (B or 1, 1, 2, keys in use), of an IntervalMask
    pattern: Tensor | None  # bool (B or 1, 1, Sq, Sk), combined with the window

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], device: torch.device, *_: Any, **__: Any
    ) -> WindowMask:
        """A tensor of this shape without storage."""
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        window: tuple[Any, ...],
        keys: int | None = None,
        *,
        padding: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        intervals: Tensor | None = None,
        pattern: Tensor | None = None,
        anchor: Tensor | None = None,
    ) -> None:
        # Dynamo of torch 2.11 puts a plain tuple into a graph, and no named one.
        self.window = Window(*window)
        self.owner = self.window.owner
        self.padding = padding
        self.cu_seqlens = cu_seqlens
        self.intervals = intervals
        self.pattern = pattern
        self.arguments: dict[tuple, tuple] = {}  # of flash_attention, by what they depend on
        # Dynamo flattens the mask into the window and tensors, of which it needs at least one. The
        # number of keys in use varies from call to call, so it must be a tensor's size.
        keys = shape[3] if keys is None else keys
        self.anchor = torch.empty(0, keys, device=device) if anchor is None else anchor

    @property
    def packing(self) -> Packing | None:
        """Boundaries of the packed sequences, None for one a row."""
        if self.cu_seqlens is None:
            return None
        return Packing(self.cu_seqlens, None, self.window.max_seqlen, self.window.max_seqlen)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """The window; the dense mask is ``repr(mask.dense())``."""
        tensors = self.__tensor_flatten__()[0][1:]
        return f"WindowMask(shape={tuple(self.shape)}, {self.window}, with {tensors})"

    def __tensor_flatten__(self) -> tuple[list[str], Window]:
        """The inner tensors' names, and the rest of the constructor's arguments."""
        names = ["anchor", "padding", "cu_seqlens", "intervals", "pattern"]
        return [name for name in names if getattr(self, name) is not None], self.window

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], window: Window, size: Any, stride: Any
    ) -> WindowMask:
        """The inverse of :meth:`__tensor_flatten__`."""
        return WindowMask(size, tensors["anchor"].device, window, None, **tensors)

    def separated(self, position_ids: Tensor | None, causal: bool) -> WindowMask:
        """The mask with a new sequence at each restart of the positions ``(B, S)``.

        Only for causal masks without a past and without an ``attention_mask``. The boundaries of
        sequences are read once per mask, which all layers share, as reading synchronizes the GPU.
        If they can't be read (under a compiler, on meta), or the mask has intervals, the sequences
        become intervals.
        """
        if position_ids is None or position_ids.ndim != 2 or not self.window.packable:
            return self
        batch, _, q_length, kv_length = self.shape
        window = self.window
        without_past = q_length == kv_length == keys_in_use(self) == position_ids.shape[-1] > 1
        of_window = self.intervals is None and self.pattern is None
        causal = window.window_size[1] == 0 or (causal and not of_window)
        if not without_past or not causal:
            return self
        sequences = restarts(position_ids).expand(batch, -1)
        window = window._replace(packable=False)
        if of_window and readable(sequences):
            if bool(sequences.any()):
                self.cu_seqlens, longest = boundaries(sequences)
                window = window._replace(max_seqlen=longest)
            self.window = window
            self.arguments.clear()
            return self
        intervals = torch.stack(runs(sequences), dim=1)[:, None].to(torch.int32)
        if self.intervals is not None:
            both = self.intervals, intervals
            starts, stops = torch.maximum(*both), torch.minimum(*both)
            intervals = torch.stack((starts[:, :, 0], stops[:, :, 1]), dim=2)
        return WindowMask(
            self.shape, self.device, window, intervals=intervals, pattern=self.pattern
        )

    def dense(self) -> Tensor:
        """The mask as a plain tensor, bool ``(B, 1, Sq, Sk)``."""
        batch, _, q_length, kv_length = self.shape
        window = self.window
        keys = keys_in_use(self)
        offset = keys - q_length if window.diagonal == "bottom_right" else 0
        query = torch.arange(q_length, device=self.device)[:, None]
        key = torch.arange(kv_length, device=self.device)
        mask = (key < keys).expand(q_length, -1)
        left, right = window.window_size
        if left is not None:
            mask = mask & (key >= query + offset - left)
        if right is not None:
            mask = mask & (key <= query + offset + right)
        mask = mask.expand(batch, 1, -1, -1)
        if self.padding is not None:
            padding = nn.functional.pad(self.padding, (0, kv_length - keys))
            mask = mask & padding[:, None, None, :]
        if self.cu_seqlens is not None:
            mask = mask & same_sequence(self._sequences(self.cu_seqlens))
        if self.intervals is not None:
            visible = visible_pairs(self.intervals, query[:, 0])
            mask = mask & nn.functional.pad(visible, (0, kv_length - keys))
        return mask if self.pattern is None else mask & self.pattern

    def _sequences(self, cu_seqlens: Tensor) -> Tensor:
        """Index of each token's packed sequence, ``(B, S)``."""
        batch, _, length, _ = self.shape
        token = torch.arange(batch * length, device=self.device)
        return torch.bucketize(token, cu_seqlens, right=True).view(batch, length)
