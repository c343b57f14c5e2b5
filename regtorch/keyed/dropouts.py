"""Dropout, attention and recurrent layers of PyTorch with keys.

They draw if they are called with `training=True`, in whichever mode the module is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regtorch._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regtorch._dropout.core import dropout
from regtorch._dropout.dtensor import Place, is_dtensor, on_local_heads, sampler_at
from regtorch._dropout.features import feature_dropout
from regtorch._random.packed import mask_sampler
from regtorch.keyed.attention import attention
from regtorch.keyed.examples import Layout
from regtorch.keyed.replacements import Draws, replaces


def _python_dropout(drop: Callable[..., Tensor]) -> Callable[..., Any]:
    def replacement(
        draws: Draws, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        if training and p == 0:
            draws.idle()
        if not training or not 0 < p <= 1:
            return NotImplemented
        y = drop(x, p, **draws.mask(x.shape, x.device))
        return x.copy_(y) if inplace else y

    return replacement


def _native_dropout(drop: Callable[..., Tensor], inplace: bool) -> Callable[..., Any]:
    def replacement(draws: Draws, x: Tensor, p: float, train: bool) -> Any:
        return apply(draws, x, p, train, inplace)

    apply = _python_dropout(drop)
    return replacement


def _of_channels(
    original: Callable[..., Tensor], batched_ndim: int = 0, drop: Any = feature_dropout
) -> Callable[..., Tensor]:
    """Return a dropout of channels for the shapes of `original`; 0 if every input is batched."""

    def channels(x: Tensor, p: float, **options: Any) -> Tensor:
        original(x, p, training=False)  # for PyTorch's warnings and errors about a shape
        channel_axis = 1 if batched_ndim in (0, x.ndim) else 0
        if x.ndim <= channel_axis:
            raise RuntimeError(
                f"input must have at least {channel_axis + 1} dimensions for "
                f"{original.__name__}; got shape {tuple(x.shape)}. Use Dropout for elements."
            )
        return drop(x, p, channel_axis=channel_axis, **options)

    return channels


for _function, _drop in {
    F.dropout: dropout,
    F.dropout1d: _of_channels(F.dropout1d, 3),
    F.dropout2d: _of_channels(F.dropout2d),
    F.dropout3d: _of_channels(F.dropout3d, 5),
    F.alpha_dropout: alpha_dropout,
    F.feature_alpha_dropout: _of_channels(F.feature_alpha_dropout, drop=feature_alpha_dropout),
}.items():
    replaces(_function, in_evaluation=True)(_python_dropout(_drop))
for _name, _drop in {
    "dropout": dropout,
    "feature_dropout": feature_dropout,
    "alpha_dropout": alpha_dropout,
    "feature_alpha_dropout": feature_alpha_dropout,
}.items():
    for _inplace in (False, True):
        _native = getattr(torch, _name + "_" * _inplace)
        replaces(_native, in_evaluation=True)(_native_dropout(_drop, _inplace))


@replaces(F.scaled_dot_product_attention, in_evaluation=True)
def _attention(
    draws: Draws,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if not 0 < dropout_p <= 1 or (is_causal and attn_mask is not None) or query.is_nested:
        return NotImplemented
    settings: Any = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}

    def attend(tensors: tuple[Any, ...], place: Place | None = None) -> Tensor:
        def drop(weights: Tensor) -> Tensor:
            shape = place.whole if place else weights.shape
            options = draws.mask(shape, weights.device, layout=Layout(0, 1))
            if place:
                options["sampler"] = sampler_at(mask_sampler(options["sampler"]), place)
            return dropout(weights, dropout_p, **options)

        return attention(*tensors, drop=drop, **settings)

    tensors = query, key, value, attn_mask
    return on_local_heads(attend, *tensors) if is_dtensor(query) else attend(tensors)


def _recurrent(function: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(draws: Draws, x: Tensor, *args: Any, **named: Any) -> Any:
        """Run layer by layer, and drop after each but the last, at `path.0`, `path.1`, …."""
        if named:
            return NotImplemented
        # For a packed sequence, the sizes of its batches precede the states.
        packed = isinstance(args[0], Tensor) and not args[0].is_floating_point()
        sizes = args[:1] if packed else ()
        hx, parameters, has_biases, layers, p, training, bidirectional, *rest = args[len(sizes) :]
        if not training or p == 0 or layers == 1:
            return NotImplemented
        directions, per_layer = 2 if bidirectional else 1, len(parameters) // layers
        states = []
        for layer in range(layers):
            if layer:
                part = str(layer - 1)
                if packed:  # its examples have no dimension
                    x = dropout(x, p, key=draws.key(x.device, part))
                else:
                    layout = Layout(0 if rest[0] else 1, 1)
                    x = dropout(x, p, **draws.mask(x.shape, x.device, part, layout=layout))
            rows = slice(layer * directions, (layer + 1) * directions)
            state = hx[rows] if isinstance(hx, Tensor) else tuple(part[rows] for part in hx)
            own = parameters[layer * per_layer : (layer + 1) * per_layer]
            settings = (has_biases, 1, 0.0, training, bidirectional, *rest)
            x, *state = function(x, *sizes, state, own, *settings)
            states.append(state)
        return x, *(torch.cat(parts) for parts in zip(*states, strict=True))

    return replacement


for _function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    replaces(_function, in_evaluation=True)(_recurrent(_function))
