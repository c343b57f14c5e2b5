"""The layers to which `regtorch.keyed.convert` converts PyTorch's own.

Each is a subclass that adds only its sites, and runs PyTorch's own forward in evaluation.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from regtorch._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regtorch._dropout.core import dropout
from regtorch._dropout.features import feature_dropout
from regtorch._random.events import observer
from regtorch._random.keys import site_words


@dataclasses.dataclass
class Site:
    """A place of a model that drops, with the state from which its next key is derived.

    Attributes:
        name: The name that `regtorch.site_key` hashes.
        root: The two words of the root key; None before the first `set_key`.
        step: The step of training.
        calls: The number of keys derived since `set_key`.
        replayed: Whether `keyed.replay` restored the calls.
    """

    name: str
    root: tuple[int, int] | None = None
    step: int = 0
    calls: int = 0
    replayed: bool = False

    def key(self, device: torch.device) -> Tensor:
        """Return the key of the next call, of the name first and then of `name#1`, `name#2`, ….

        It is an error if no key was set, or if a checkpoint repeats one of several calls.
        """
        if self.root is None:
            raise ValueError(
                f"site {self.name!r} must have a key in training; got None. Call "
                "regtorch.keyed.set_key(model, root, step) before each step, or model.eval() to "
                "evaluate."
            )
        name = f"{self.name}#{call}" if (call := self._next_call()) else self.name
        words = site_words(self.root, self.step, name)
        return torch.tensor(words, dtype=torch.uint32, device=device)

    def _next_call(self) -> int:
        # A forward inside a backward pass (id other than -1) is a checkpoint's, run again.
        if torch._C._current_graph_task_id() != -1 and not self.replayed:
            if self.calls != 1:
                raise RuntimeError(
                    f"site {self.name!r} must be called once after set_key, so that a checkpoint "
                    f"can repeat the call; got {self.calls} calls. Pass context_fn=lambda: "
                    "regtorch.keyed.replay(model) and use_reentrant=False to "
                    "torch.utils.checkpoint.checkpoint, and call set_key after the backward pass."
                )
            return 0
        self.calls += 1
        return self.calls - 1


class Keyed(nn.Module):
    """A layer with sites, a subclass of PyTorch's own layer."""

    sites: tuple[Site, ...]

    @classmethod
    def site_names(cls, module: Any, path: str) -> list[str]:
        """Return the names of a module's sites, given its path in the model."""
        return [path]

    def extra_repr(self) -> str:
        """Return PyTorch's text for the layer, with the names of the sites."""
        names = ", ".join(site.name for site in self.sites)
        return ", ".join(filter(None, [super().extra_repr(), f"site={names}"]))


class _KeyedDropout(Keyed):
    twin_function: ClassVar[Callable[..., Tensor]]
    p: float
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch.nn's name
        if not self.training or self.p == 0:
            if self.training and (observers := observer()):
                observers.idle(self.sites[0].name)
            return super().forward(input)
        y = self._drop(input)
        return input.copy_(y) if self.inplace else y

    def _drop(self, x: Tensor) -> Tensor:
        return self.twin_function(x, self.p, key=self.sites[0].key(x.device))


class _KeyedFeatureDropout(_KeyedDropout):
    """Dropout of whole channels, of every shape that PyTorch's own layer accepts."""

    original: ClassVar[Callable[..., Tensor]]
    twin_function = staticmethod(feature_dropout)
    # The ndim of a batched input; 0 if every input is batched.
    batched_ndim: ClassVar[int] = 0

    def _drop(self, x: Tensor) -> Tensor:
        self.original(x, self.p, training=False)  # for PyTorch's warnings and errors about a shape
        channel_axis = 1 if self.batched_ndim in (0, x.ndim) else 0
        if x.ndim <= channel_axis:
            raise RuntimeError(
                f"input must have at least {channel_axis + 1} dimensions for "
                f"{ORIGINAL[type(self)].__name__}; got shape {tuple(x.shape)}. Use Dropout for "
                "elements."
            )
        key = self.sites[0].key(x.device)
        return self.twin_function(x, self.p, key=key, channel_axis=channel_axis)


class KeyedDropout(_KeyedDropout, nn.Dropout):
    """`torch.nn.Dropout` at a site."""

    twin_function = staticmethod(dropout)


class KeyedDropout1d(_KeyedFeatureDropout, nn.Dropout1d):
    """`torch.nn.Dropout1d` at a site."""

    original = staticmethod(F.dropout1d)
    batched_ndim = 3


class KeyedDropout2d(_KeyedFeatureDropout, nn.Dropout2d):
    """`torch.nn.Dropout2d` at a site."""

    original = staticmethod(F.dropout2d)


class KeyedDropout3d(_KeyedFeatureDropout, nn.Dropout3d):
    """`torch.nn.Dropout3d` at a site."""

    original = staticmethod(F.dropout3d)
    batched_ndim = 5


class KeyedAlphaDropout(_KeyedDropout, nn.AlphaDropout):
    """`torch.nn.AlphaDropout` at a site."""

    twin_function = staticmethod(alpha_dropout)


class KeyedFeatureAlphaDropout(_KeyedFeatureDropout, nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout` at a site."""

    original = staticmethod(F.feature_alpha_dropout)
    twin_function = staticmethod(feature_alpha_dropout)


class KeyedMultiheadAttention(Keyed, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` at a site; training computes the attention weights explicitly.

    The mask is drawn for the weights, in the shape (batch, heads, queries, keys), whatever the
    layout of the inputs.
    """

    @classmethod
    def site_names(cls, module: Any, path: str) -> list[str]:
        """Return the module's own path; nothing if it does not drop."""
        return [path] if module.dropout else []

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
        """Take the arguments and return the results of `torch.nn.MultiheadAttention`."""
        if not self.training or self.dropout == 0:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask must be a mask with is_causal=True; got None. Pass both.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        for mask in self._masks(attn_mask, key_padding_mask, scores):
            scores = scores + mask
        weights = torch.softmax(scores, dim=-1)
        weights = dropout(weights, self.dropout, key=self.sites[0].key(weights.device))
        y = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            y, weights = y.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, weights if need_weights else None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values as (batch, heads, length, features of a head)."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), weights, biases)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, extra.expand(len(x), 1, -1)], dim=1)
                for x, extra in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, scores: Tensor
    ) -> list[Tensor]:
        """Return the terms to add to the scores; True in a boolean mask forbids."""
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, scores.shape[:2])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.reshape(len(scores), 1, 1, -1)
        masks = []
        for mask in (attn_mask, key_padding_mask):
            if mask is not None:
                if mask.dtype == torch.bool:
                    zeros = torch.zeros_like(mask, dtype=scores.dtype)
                    mask = zeros.masked_fill(mask, -torch.inf)
                # Every query may attend to the keys that the layer adds.
                masks.append(F.pad(mask, (0, scores.shape[-1] - mask.shape[-1])))
        return masks


class _KeyedRecurrent(Keyed):
    """A recurrent layer, trained layer by layer, with a site after each but the last: `path.0`, ….

    One layer is PyTorch's own forward on a copy that shares the parameters, and that handles packed
    sequences, missing batches, projections and directions. Where nothing is dropped, the result is
    bitwise identical to PyTorch's layer; with an initial state it agrees to rounding, since the
    order of PyTorch's own sums depends on the address of the state.
    """

    original: ClassVar[type[nn.RNNBase]]
    num_layers: int
    hidden_size: int
    proj_size: int
    dropout: float
    bidirectional: bool
    _all_weights: list[list[str]]

    @classmethod
    def site_names(cls, module: Any, path: str) -> list[str]:
        """Return a name for each layer but the last; nothing if the module does not drop."""
        between = module.num_layers - 1 if module.dropout else 0
        return [".".join(filter(None, [path, str(layer)])) for layer in range(between)]

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002 - torch.nn's
        """Take the arguments and return the results of PyTorch's layer."""
        if not self.training or self.dropout == 0:
            return super().forward(input, hx)
        x, states = input, []
        for index in range(self.num_layers):
            if index:
                x = self._drop(x, self.sites[index - 1])
            x, state = self._layer(index).forward(x, self._state_of(hx, index))
            states.append(state)
        if isinstance(states[0], tuple):
            return x, tuple(torch.cat(parts) for parts in zip(*states, strict=True))
        return x, torch.cat(states)

    def _drop(self, x: Any, site: Site) -> Any:
        if isinstance(x, PackedSequence):
            return x._replace(data=self._drop(x.data, site))
        return dropout(x, self.dropout, key=site.key(x.device))

    def _state_of(self, hx: Any, index: int) -> Any:
        """Return one layer's part of the initial state."""
        if hx is None:
            return None
        if isinstance(hx, tuple):
            return tuple(self._state_of(part, index) for part in hx)
        directions = 2 if self.bidirectional else 1
        return hx[index * directions : (index + 1) * directions]

    def _layer(self, index: int) -> nn.RNNBase:
        """Return one layer as a module of PyTorch's own, on the same parameters."""
        layer: Any = copy.copy(self)
        layer.__class__ = self.original
        directions = 2 if self.bidirectional else 1
        rows = self._all_weights[index * directions : (index + 1) * directions]
        layer.num_layers, layer.dropout = 1, 0.0
        if index:
            layer.input_size = (self.proj_size or self.hidden_size) * directions
        layer._all_weights = rows
        layer._flat_weights_names = [name for row in rows for name in row]
        layer._flat_weights = [getattr(self, name) for name in layer._flat_weights_names]
        layer._flat_weight_refs = [weakref.ref(weight) for weight in layer._flat_weights]
        return layer


class KeyedRNN(_KeyedRecurrent, nn.RNN):
    """`torch.nn.RNN` with sites between its layers."""

    original = nn.RNN


class KeyedLSTM(_KeyedRecurrent, nn.LSTM):
    """`torch.nn.LSTM` with sites between its layers."""

    original = nn.LSTM


class KeyedGRU(_KeyedRecurrent, nn.GRU):
    """`torch.nn.GRU` with sites between its layers."""

    original = nn.GRU


# The keys are PyTorch's exact classes: a subclass may have a forward of its own.
KEYED: dict[type[nn.Module], type[Keyed]] = {
    nn.Dropout: KeyedDropout,
    nn.Dropout1d: KeyedDropout1d,
    nn.Dropout2d: KeyedDropout2d,
    nn.Dropout3d: KeyedDropout3d,
    nn.AlphaDropout: KeyedAlphaDropout,
    nn.FeatureAlphaDropout: KeyedFeatureAlphaDropout,
    nn.MultiheadAttention: KeyedMultiheadAttention,
    nn.RNN: KeyedRNN,
    nn.LSTM: KeyedLSTM,
    nn.GRU: KeyedGRU,
}
ORIGINAL = {keyed: original for original, keyed in KEYED.items()}
