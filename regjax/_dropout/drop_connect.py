"""DropConnect: dropout of the weights of a layer, not of its activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from regjax._checks import naming
from regjax._decay.param_trees import decay_mask
from regjax._decay.paths import path_name
from regjax._dropout.core import SampledMask, apply_dropout, check_flag, check_inexact, is_number
from regjax._random.bernoulli import Sampler, bernoulli, check_probability
from regjax._random.by_example import check_one_mask
from regjax._random.keys import check_key, site_key
from regjax._random.packed import mask_sampler
from regshared.globs import components
from regshared.spellings import explain_names

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import PyTree

    from regjax._decay.paths import KeyPath
    from regjax._random.keys import KeyLike
    from regshared.decay_rules import Rule


@explain_names
def drop_connect(
    weights: PyTree,
    rate: ArrayLike,
    *,
    key: KeyLike | None = None,
    deterministic: ArrayLike = False,
    rule: Rule = "default",
    sampler: Sampler = bernoulli,
) -> PyTree:
    """Zero each weight with probability `rate` and divide the others by `1 - rate`.

    In a pytree, the kernels are dropped: the leaves that `rule` selects, as in `decay_mask`.
    Biases, scales of norms and embeddings stay unchanged unless the rule selects them; the paper
    drops biases too, `rule="**"`. Each leaf draws from its own key, `site_key(key, 0, name)`, where
    the name is the leaf's path with slashes. The gradient of a dropped weight is 0.

    A call draws one mask, and every row of a batch meets the same weights. The paper draws a mask
    for each example; that is `jax.vmap` over keys, at the cost of as many kernels as rows, as in
    the second example. In evaluation the paper approximates the mean over masks by samples of a
    normal distribution; here weights are scaled in training, and evaluation uses them unchanged.
    The other errors are those of `dropout` and `decay_mask`.

    Args:
        weights: One floating or complex array, or a pytree; its other leaves stay unchanged.
        rate: See `dropout`.
        key: See `dropout`.
        deterministic: See `dropout`.
        rule: The leaves to drop: "default" (kernels), a glob such as `"**/recurrent_kernel"`, a
            function `(path, leaf, kind)`, or pairs of glob and bool; see `regshared.decay_rules`.
            The default rule always drops a single array, whatever its name.
        sampler: See `dropout`. `by_example(i)` draws the mask of example i.

    Returns:
        An array, or a pytree of the same structure, shapes and dtypes as `weights`.

    Raises:
        ValueError: The rule selects nothing.

    Note (PyTorch):
        `regtorch.drop_connect` of a dict from names to tensors draws the same masks where names and
        shapes are the same; a dot counts as a slash. `regtorch.nn.DropConnect` wraps a module.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> layer = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> regjax.drop_connect(layer, 0.5, key=jax.random.key(0))
        {'bias': Array([1., 1., 1.], dtype=float32),
         'kernel': Array([[0., 2., 0.],
                [0., 0., 2.]], dtype=float32)}

        >>> def row(x, key):  # one mask for each example
        ...     return x @ regjax.drop_connect(layer["kernel"], 0.5, key=key) + layer["bias"]
        >>> jax.vmap(row)(jnp.ones((4, 2)), jax.random.split(jax.random.key(0), 4)).shape
        (4, 3)

    References:
        Wan et al., "Regularization of neural networks using DropConnect", ICML 2013. Recurrent
        weights: Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", ICLR
        2018.
    """
    rate = check_probability("rate", rate)
    deterministic = check_flag(deterministic)
    chosen = _chosen(weights, rule)
    spec = SampledMask("drop_connect", check_one_mask(mask_sampler(sampler)))
    if deterministic is True or is_number(rate, 0):
        return weights
    key = None if key is None else check_key(key)

    def leaf(path: KeyPath, weight: Any, is_chosen: bool) -> Any:
        if not is_chosen:
            return weight
        name = "/".join(components(path_name(path)))
        leaf_key = site_key(key, 0, name) if path and key is not None else key
        with naming(x="weights"):
            return apply_dropout(spec, check_inexact(weight), rate, leaf_key, deterministic)

    return jax.tree.map_with_path(leaf, weights, chosen)


def _chosen(weights: PyTree, rule: Rule) -> PyTree[bool]:
    """Return which leaves are dropped."""
    if isinstance(rule, str) and rule == "default" and jax.tree_util.all_leaves([weights]):
        return True
    chosen = decay_mask(weights, rule)
    if not any(jax.tree.leaves(chosen)):
        raise ValueError(
            f"weights must have a leaf that rule {rule!r} selects; got none. Pass rule='**' for "
            "all."
        )
    return chosen
