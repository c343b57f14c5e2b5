"""The train step of `examples.sharded_lm`, compiled for accelerators that need not be present.

The shape of the model is larger than the example's default. The batch grows with the number of
devices, so that each device has the same number of examples. Nothing runs: costs are those that
the compiler records in the program.

JAX is imported inside functions only, since compilers read their settings on import.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import gpu_model, tpu_model

if TYPE_CHECKING:
    import jax

    from examples.sharded_lm.settings import Recipe

RATE, DECAY = 0.1, 0.1
# By variant: the dropout rate and the weight decay. Their costs add up.
VARIANTS = {"without": (0.0, 0.0), "decay": (0.0, DECAY), "dropout": (RATE, 0.0)}
SIZES: dict[str, Any] = {"width": 512, "depth": 1, "heads": 8, "context": 512}
SMALL: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2, "context": 16}
EXAMPLES = 2  # per device
TENSOR, MOST_FSDP = 2, 16
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


@dataclass(frozen=True)
class Compiled:
    """One variant of the step, compiled for one grid of devices.

    Attributes:
        grid: The kind of device, and the grid.
        devices: The number of devices.
        variant: One of `VARIANTS`.
        cost: The estimated cost of all kernels of a device, without collectives, in the unit of the
            compiler; 0 for CPUs, whose compiler records none.
        argument: The bytes of arguments on each device.
        temporary: The bytes beyond arguments and results on each device.
        collectives: By kind, the number of operations, and the bytes of their results on a device.
    """

    grid: str
    devices: int
    variant: str
    cost: float
    argument: int
    temporary: int
    collectives: Mapping[str, tuple[int, int]]


def compile_all(grids: Sequence[str], sizes: Mapping[str, int] = SIZES) -> list[Compiled]:
    """Compile every variant for every grid, such as "v5e:2x2" or "H100:1x1x8" or "CPU:8"."""
    from rich.progress import track

    work = [(grid, variant) for grid in grids for variant in VARIANTS]
    return [compile_one(grid, variant, sizes) for grid, variant in track(work, "compiling steps")]


def compile_one(grid: str, variant: str, sizes: Mapping[str, int]) -> Compiled:
    """Compile one variant for one grid."""
    devices, cost_of = _devices(grid)
    compiled = compile_step(devices, *VARIANTS[variant], sizes)
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert memory is not None
    return Compiled(
        grid,
        len(devices),
        variant,
        cost_of(text),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        collectives(text),
    )


def _devices(grid: str) -> tuple[Sequence[Any], Callable[[str], float]]:
    """Return the devices of a grid, and the function that reads the costs of a program."""
    if grid.startswith("H100:"):
        return gpu_model.devices(grid), gpu_model.step_microseconds
    if grid.startswith("CPU:"):
        import jax

        return jax.devices()[: int(grid.removeprefix("CPU:"))], lambda program: 0.0
    return tpu_model.devices(grid), tpu_model.cycles


def compile_step(
    devices: Sequence[Any], rate: float, decay: float, sizes: Mapping[str, int]
) -> jax.stages.Compiled:
    """Compile a train step for a mesh of the devices."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from examples.sharded_lm import train
    from examples.sharded_lm.data import Batch
    from examples.sharded_lm.settings import AXES, DATA, FSDP

    shape = mesh_shape(len(devices))
    mesh = Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    recipe = _recipe(len(devices), rate, decay, sizes)
    rows = NamedSharding(mesh, PartitionSpec(None, (DATA, FSDP)))

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)

    batch = Batch(array(1, recipe.batch, recipe.context + 1), array(1, recipe.batch))
    with jax.set_mesh(mesh):
        program = train.make_program(recipe, mesh)
        step: Any = program.train_step  # jitted
        return step.lower(train.abstract(program), batch).compile()


def _recipe(devices: int, rate: float, decay: float, sizes: Mapping[str, Any]) -> Recipe:
    from examples.sharded_lm.settings import Recipe

    return Recipe(**sizes, batch=EXAMPLES * devices, rate=rate, weight_decay=decay)


def mesh_shape(devices: int) -> tuple[int, int, int]:
    """Return the sizes of the axes data, fsdp and tensor.

    Example:
        >>> mesh_shape(1), mesh_shape(4), mesh_shape(256)
        ((1, 1, 1), (1, 2, 2), (8, 16, 2))
    """
    tensor = math.gcd(devices, TENSOR)
    fsdp = math.gcd(devices // tensor, MOST_FSDP)
    return devices // (tensor * fsdp), fsdp, tensor


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """Return the number and the bytes of the results of each kind of collective in a program.

    Example:
        >>> collectives("%r = f32[4,8]{1,0} all-reduce(%x), to_apply=%add")
        {'all-reduce': (1, 128)}
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for result, kind, start in re.findall(rf"= (.*?) ({KINDS})(-start)?\(", program):
        shapes = [_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", result)]
        if start and kind != "all-reduce":  # operands come before results, and context after
            shapes = [size for size in shapes if size > 4]
            shapes = shapes[len(shapes) // 2 :]
        counts[kind] += 1
        sizes[kind] += sum(shapes)
    return {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)}


def _bytes(dtype: str, shape: str) -> int:
    return _BYTES.get(dtype, 4) * math.prod(int(size) for size in shape.split(",") if size)
