"""Explicit keys for the dropout of an existing, unmodified model in Flax or Equinox.

    def loss(params, batch, step):
        model = regjax.keyed.bind(Model(), root, step)
        return mean_loss(model.apply(params, batch))

Each dropout layer, and the dropout of attention, draws from `regjax.site_key(root, step, name)`. A
PyTorch model after `regtorch.keyed.set_key(model, root, step)` uses the same keys, so that the port
drops the same elements, bit for bit, if its sites have the same names.

**Sites.** A site is a module that drops: `Dropout` of the framework, every layer of `regjax.linen`
and `regjax.nnx`, and attention (`flax.linen.MultiHeadDotProductAttention` and its subclasses,
`flax.nnx.MultiHeadAttention`, `equinox.nn.MultiheadAttention`). Its path has the parts of the model
joined by `/`, such as `"layers/0/attention"`. A site draws by `regjax.dropout`, and its own key or
`rngs`, passed in the call or held by the module, is not used. In Linen a module that calls
`make_rng("dropout")` is a site, too: it receives the key of the site, with which
`jax.random.bernoulli` draws the mask of `regjax.bernoulli`, and Flax's `dot_product_attention` that
of attention.

**Names.** By default the name is the path with dots for slashes. `names` maps paths of sites, or of
modules with sites, to the names in PyTorch; the longest path that contains a site applies, and the
rest of the path is appended. So `{"encoder/0": "encoder.layers.0", "": ""}` renames one module and
keeps the others. A module in PyTorch that draws twice in a call has a second name, `path:1`, and so
has one in Linen that calls `make_rng` twice; a site of its own is mapped to it. Call n of a site,
counted from 0, has the key of `name#n` from the second on.

**Attention.** Modules of Flax share one mask among batch and heads by default, which stays as it
is. PyTorch and Equinox draw one for every weight; pass `broadcast_dropout=False` for this in Flax.
This includes the calls of `flax.linen.dot_product_attention` and `dot_product_attention_weights` in
modules of any library. A Flax module with an `attention_fn` of its own calls it with the site's
key.

**Transformations.** Bind inside the function that is jitted or differentiated; `root` and `step`
may be traced. Each binding counts calls from 0. Under `jax.vmap` a mask is that of the whole batch,
mapped axes first, which PyTorch draws for the same batch. The other layers of `regjax.linen` and
`regjax.nnx` are errors there, as they mask whole rows. A site that is called in a loop of JAX is an
error, because all iterations would share a mask, with two exceptions: the model is bound in each
iteration with a step or root that the loop changes, or the name of the site has the number of the
iteration. Microbatches of one step need this, too: bind with the step `step * count + i`, or with a
root of each. Devices of `jax.pmap` and `jax.shard_map` share masks unless their roots differ:
`jax.random.fold_in(root, jax.lax.axis_index("data"))`.

- Linen: `{}` after the name of a module that `linen.scan` repeats stands for the number, as in
  `"layers.{}.dropout"`. The scan must split the rngs `"dropout"`. In a module inside `vmap` or
  `jit` of Linen a site is an error. `remat` is supported.
- NNX: the bound model shares the variables of the model. A copy of it, as made by transformations
  of NNX that it is passed to, is an error when it draws. Stacked layers, whose arrays have an axis
  of the layers in front, are passed to `nnx.scan` or `nnx.vmap`, or split for `jax.lax.scan`, if
  `names` has their number: `names={"": "", "layers": "layers.{}"}`.
- Equinox: the bound model is a new pytree, and can be passed to `eqx.filter_jit`. A transformation
  that it is passed to counts calls from 0: pass a layer that is called repeatedly in a closure.
  Stacked layers have the names of those of NNX, and are split by `eqx.partition` for
  `jax.lax.scan`, or passed to `eqx.filter_vmap`.

In NNX and Equinox, a second loop over the same stacked layers needs a second binding.

**Limitations.** JAX traces a function once for several calls with inputs of the same shapes, so
that calls of `f = jax.jit(layer)` or `f = jax.checkpoint(layer)` in a bound model may share a mask:
create a function for each call, as in `jax.checkpoint(lambda x: layer(x))(x)`. A step that is an
argument of such a function in a loop is accepted as one that the loop changes. Calls of a stacked
layer in several `vmap`, or of several copies of it, count from 0. In NNX and Equinox, draws by
other functions, such as `jax.random.bernoulli` in a module, are not seen. In Linen, other functions
of `jax.random`, a `bernoulli` that was imported by name, and keys split from that of a site draw
from the site's key, but observers do not record them, and their values may depend on the
configuration of JAX; under `jax.vmap`, their rows share them. Models of Haiku cannot be bound,
because `hk.next_rng_key` cannot be replaced: pass keys such as `regjax.site_key(root, step,
hk.experimental.current_name())` to `hk.dropout`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regshared.checks import check_bool, describe

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from regjax._random.keys import KeyLike

__all__ = ["bind", "sites"]


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


def bind(
    model: Any,
    root: KeyLike,
    step: ArrayLike,
    *,
    names: Mapping[str, str] | None = None,
    broadcast_dropout: bool | None = None,
) -> Any:
    """Return a model whose dropout draws from explicit keys; `model` itself does not change.

    Args:
        model: A module of Flax Linen, Flax NNX or Equinox.
        root: One key; it may be used again, as with `site_key`.
        step: The step of training, an integer of at least 0; may be traced.
        names: The names of sites by path; by default, the paths with dots. `{}` in a name is the
            number of an iteration or of a stacked layer.
        broadcast_dropout: Whether attention of Flax shares one mask among batch and heads; by
            default, as each module has it. False draws one for every weight, as PyTorch does.

    Returns:
        For NNX, a model with the same variables. For Equinox, a model. For Linen, an object whose
        method `apply(variables, *args, **options)` calls `model.apply`, without keys for dropout.

    Raises:
        TypeError: `model` is not a module of these frameworks, or has layers that cannot be keyed,
            all of which are listed; `names` is not a dict of strings; or as `site_key`.
        ValueError: `names` lacks a site, has a path without sites (in Linen, `sites` checks this),
            or gives two sites the same name; or as `site_key`. With Linen, `apply` raises it.

    Note (PyTorch):
        `regtorch.keyed.set_key` changes its model in place.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dropout(0.5, deterministic=False)])
        >>> names = {"layers_0": "drop"}
        >>> bound = regjax.keyed.bind(model, jax.random.key(0), step=3, names=names)
        >>> bound.apply({}, jnp.ones(6))
        Array([2., 0., 0., 0., 2., 2.], dtype=float32)
        >>> key = regjax.site_key(jax.random.key(0), 3, "drop")
        >>> regjax.dropout(jnp.ones(6), 0.5, key=key)
        Array([2., 0., 0., 0., 2., 2.], dtype=float32)
    """
    framework = _framework(model)
    if broadcast_dropout is not None:
        check_bool("broadcast_dropout", broadcast_dropout)
    if framework == "linen":
        from regjax.keyed.linen import BoundModule

        return BoundModule(model, root, step, names, broadcast_dropout)
    if framework == "nnx":
        from regjax.keyed.nnx import bind_nnx

        return bind_nnx(model, root, step, names, broadcast_dropout)
    from regjax.keyed.equinox import bind_equinox

    return bind_equinox(model, root, step, names)


def sites(
    model: Any, *args: Any, names: Mapping[str, str] | None = None, **options: Any
) -> list[str]:
    """Return the names of the sites of a model, and check `names`.

    Args:
        model: As for `bind`.
        *args: For Linen, the arguments of a call in training, whose sites are listed in order; no
            array is computed.
        names: As for `bind`.
        **options: For Linen, the named arguments of the call.

    Raises:
        TypeError: As `bind`, or arguments are given for NNX or Equinox.
        ValueError: As `bind`.

    Example:
        >>> import equinox as eqx, jax, regjax
        >>> model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
        >>> layers = eqx.nn.Sequential([model, eqx.nn.Dropout()])
        >>> regjax.keyed.sites(layers), regjax.keyed.sites(layers, names={"layers": ""})
        (['layers.1'], ['1'])
    """
    framework = _framework(model)
    if framework == "linen":
        from regjax.keyed.linen import linen_sites

        return linen_sites(model, names, args, options)
    if args or options:
        raise TypeError(f"args must be given for a module of Linen only; got {[*args, *options]}.")
    if framework == "nnx":
        from regjax.keyed.nnx import nnx_sites

        return nnx_sites(model, names)
    from regjax.keyed.equinox import equinox_sites

    return equinox_sites(model, names)


def _framework(model: Any) -> str:
    """Return the framework of a module, which has imported the framework."""
    for name, package in (("linen", "flax.linen"), ("nnx", "flax.nnx"), ("equinox", "equinox")):
        loaded: Any = sys.modules.get(package)
        if loaded is not None and isinstance(model, loaded.Module):
            return name
    raise TypeError(
        f"model must be a module of flax.linen, flax.nnx or equinox; got {describe(model)}."
    )
