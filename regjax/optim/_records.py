"""One record per optimizer: its options and its state, in PyTorch and in JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# The options of a parameter group.
Options = Mapping[str, Any]


@dataclass(frozen=True)
class StateArray:
    """An array that an optimizer keeps for each parameter.

    Attributes:
        field: Its field in the optax state.
        torch_name: Its name in PyTorch's state.
        is_kept: Whether it exists, given the options and the parameter's number of axes.
        is_optional: Whether PyTorch may lack it, which is the same as zeros, given the options.
        axis: The axis along which a factor has length 1; None if it has the parameter's shape.
    """

    field: str
    torch_name: str
    is_kept: Callable[[Options, int], bool] = lambda options, ndim: True
    is_optional: Callable[[Options], bool] = lambda options: False
    axis: int | None = None


@dataclass(frozen=True)
class Record:
    """An optimizer of PyTorch and its counterpart in JAX.

    Attributes:
        torch_name: The class.
        function: The function in `regjax.optim`, or a function of the learning rate and the options
            that returns a transformation.
        options: The options of both, by PyTorch's names, without the learning rate.
        arrays: The arrays that both keep for each parameter.
        numbers: The numbers that PyTorch keeps for each parameter and JAX once, without `step`.
        derived: The numbers that only PyTorch keeps, as functions of the step and the options.
        counts_steps: Whether PyTorch keeps `step`.
        shares_count: Whether the link `learning_rate` counts steps without a schedule too, given
            the options. Its count is then both PyTorch's `step` and the step of the schedule;
            otherwise only that of the link `moments` is `step`.
        has_schedule: Whether a scheduler of the learning rate has an effect.
        depends_on_layout: Whether a step depends on the order of a matrix's axes.
        numbers_on_device: Whether PyTorch always keeps numbers on the parameter's device.
        home: The module of the class.
        renamed_options: The names here of options that the class names otherwise, by its names.
        defaults: The values of options that the class lacks.
        fixed: The options without a counterpart, and the only value of each.
        ignored: The options without an effect on the result.
        renamed_state: The names here of state entries that the class names otherwise.
        python_numbers: Whether the class keeps numbers as such, not as tensors.
    """

    torch_name: str
    function: str | Callable[..., Any]
    options: tuple[str, ...]
    arrays: tuple[StateArray, ...]
    numbers: tuple[str, ...] = ()
    derived: Mapping[str, Callable[[float, Options], float]] = field(default_factory=dict)
    counts_steps: bool = True
    shares_count: Callable[[Options], bool] = lambda options: False
    has_schedule: bool = True
    depends_on_layout: bool = False
    numbers_on_device: bool = False
    home: str = "torch.optim"
    renamed_options: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    renamed_state: Mapping[str, str] = field(default_factory=dict)
    python_numbers: bool = False

    @property
    def title(self) -> str:
        """The class with its module."""
        return f"{self.home}.{self.torch_name}"

    @property
    def is_created(self) -> bool:
        """True if a function outside `regjax.optim` creates the transformation."""
        return not isinstance(self.function, str)

    @property
    def is_factored(self) -> bool:
        """True if some arrays are factors, not of the parameter's shape."""
        return any(array.axis is not None for array in self.arrays)

    @property
    def momentum(self) -> str:
        """The option that a scheduler of the momentum moves: of "betas" the first."""
        return "betas" if "betas" in self.options else "momentum"

    @property
    def torch_names(self) -> dict[str, str]:
        """PyTorch's names of the arrays, by the fields of the optax state."""
        return {array.field: array.torch_name for array in self.arrays}

    @property
    def entries(self) -> dict[str, str]:
        """The names of the arrays in the state of the class, by the fields of the optax state."""
        theirs = {ours: name for name, ours in self.renamed_state.items()}
        return {field: theirs.get(name, name) for field, name in self.torch_names.items()}

    def read_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a parameter group with the names of the options here, and with the defaults."""
        without = {*self.fixed, *self.ignored}
        renamed = {
            self.renamed_options.get(name, name): value
            for name, value in group.items()
            if name not in without
        }
        return {**self.defaults, **renamed}

    def read_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter with the names of the entries here."""
        return {self.renamed_state.get(name, name): value for name, value in state.items()}

    def write_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter with the names of the class."""
        theirs = {ours: name for name, ours in self.renamed_state.items()}
        return {theirs.get(name, name): value for name, value in state.items()}


def _record(torch_name: str, options: str, *arrays: StateArray, **settings: Any) -> Record:
    function = settings.pop("function", torch_name.lower())
    return Record(torch_name, function, tuple(options.split()), arrays, **settings)


def _if_set(option: str) -> Callable[[Options, int], bool]:
    return lambda options, ndim: bool(options.get(option))


_AVERAGE, _SQUARE = StateArray("mu", "exp_avg"), StateArray("nu", "exp_avg_sq")
_ADAM = _AVERAGE, _SQUARE, StateArray("nu_max", "max_exp_avg_sq", _if_set("amsgrad"))
_ADAM_OPTIONS = "betas eps weight_decay amsgrad maximize decoupled_weight_decay"
_BUFFER = StateArray("trace", "momentum_buffer", _if_set("momentum"))
_RECORDS = (
    _record(
        "SGD",
        "momentum dampening weight_decay nesterov maximize",
        # A first gradient is not damped, so with dampening it must come to all parameters at once.
        replace(_BUFFER, is_optional=lambda options: options["dampening"] == 0),
        counts_steps=False,
    ),
    _record(
        "ASGD",
        "lambd alpha t0 weight_decay maximize",
        StateArray("ax", "ax"),
        numbers=("eta",),
        derived={"mu": lambda step, options: 1 / max(1, step - options["t0"])},
        shares_count=lambda options: True,
        numbers_on_device=True,
    ),
    _record(
        "Rprop",
        "etas step_sizes maximize",
        StateArray("prev", "prev"),
        StateArray("step_size", "step_size"),
        has_schedule=False,
    ),
    _record("Adam", _ADAM_OPTIONS, *_ADAM),
    # A group of AdamW has decoupled_weight_decay too, which decides.
    _record("AdamW", _ADAM_OPTIONS, *_ADAM, function="adam"),
    _record(
        "NAdam",
        "betas eps weight_decay momentum_decay decoupled_weight_decay maximize",
        _AVERAGE,
        _SQUARE,
        numbers=("mu_product",),
    ),
    _record("RAdam", "betas eps weight_decay decoupled_weight_decay maximize", _AVERAGE, _SQUARE),
    _record("Adamax", "betas eps weight_decay maximize", _AVERAGE, StateArray("nu", "exp_inf")),
    _record(
        "Adagrad",
        "lr_decay weight_decay initial_accumulator_value eps maximize",
        StateArray("sum_of_squares", "sum"),
        shares_count=lambda options: options["lr_decay"] != 0,
    ),
    _record(
        "Adadelta",
        "rho eps weight_decay maximize",
        StateArray("e_g", "square_avg"),
        StateArray("e_x", "acc_delta"),
    ),
    _record(
        "RMSprop",
        "alpha eps weight_decay momentum centered maximize",
        StateArray("nu", "square_avg"),
        StateArray("mu", "grad_avg", _if_set("centered")),
        _BUFFER,
    ),
    _record(
        "Adafactor",
        "beta2_decay eps d weight_decay maximize",
        StateArray("v_row", "row_var", lambda options, ndim: ndim > 1, axis=-1),
        StateArray("v_col", "col_var", lambda options, ndim: ndim > 1, axis=-2),
        StateArray("v", "variance", lambda options, ndim: ndim < 2),
        shares_count=lambda options: True,
    ),
    _record(
        "Muon",
        "weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn",
        StateArray("ema", "momentum_buffer"),
        counts_steps=False,
        depends_on_layout=True,
    ),
)
RECORDS = {record.torch_name: record for record in _RECORDS}
