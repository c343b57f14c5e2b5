"""Module of DropConnect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regtorch._decay.param_trees import decay_mask
from regtorch._dropout.drop_connect import drop_connect
from regtorch._random.bernoulli import check_probability
from regtorch.nn._layer import GeneratorModule

if TYPE_CHECKING:
    from regshared.decay_rules import Rule


class DropConnect(GeneratorModule):
    """A module whose weights are dropped in training, with one mask for each call.

    In training each call runs the wrapped module with `regtorch.drop_connect` of its weights; after
    `eval()` it runs the module unchanged. The parameters are those of the wrapped module, with the
    prefix `module.`, and the optimizer gets undropped weights. Around a recurrent module, with
    `rule="weight_hh_*"`, it drops connections between states, with one mask for the whole sequence.

    Attributes:
        module: The wrapped module.
        rate: The probability that a weight is zeroed.
        names: The names of the dropped parameters, selected by the rule ("default": the kernels) at
            construction. Frozen parameters are never selected.
        generator: The source of the key of a call without one.

    Raises:
        ValueError: The rule selects nothing, or as for `regtorch.decay_mask`.

    Note (JAX):
        `regjax.drop_connect` of a pytree with the same names and shapes draws the same masks.

    Example:
        >>> import torch, regtorch
        >>> layer = regtorch.nn.DropConnect(torch.nn.Linear(4, 3), 0.5)
        >>> layer.names, layer(torch.ones(2, 4), key=regtorch.key(0)).shape
        (('weight',), torch.Size([2, 3]))
        >>> lstm = regtorch.nn.DropConnect(torch.nn.LSTM(4, 3), 0.5, rule="weight_hh_*")
        >>> states, _ = lstm(torch.ones(5, 2, 4), key=regtorch.key(0))
    """

    def __init__(
        self,
        module: nn.Module,
        rate: float = 0.5,
        *,
        rule: Rule = "default",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.rate = check_probability("rate", rate)
        self.names = tuple(name for name, chosen in decay_mask(module, rule).items() if chosen)
        if not self.names:
            raise ValueError(
                f"module must have a parameter that rule {rule!r} selects; got none. Pass "
                "rule='**' for all."
            )
        self.generator = generator

    def forward(
        self, *args: Any, key: Tensor | torch.Generator | None = None, **kwargs: Any
    ) -> Any:
        if not self.training:
            return self.module(*args, **kwargs)
        key = self.generator if key is None else key
        weights = {name: self.module.get_parameter(name) for name in self.names}
        dropped = drop_connect(weights, self.rate, key=key, rule="**")
        return torch.func.functional_call(self.module, dict(dropped), args, kwargs)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, names={self.names}"
