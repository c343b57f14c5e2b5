r"""Estimate the cost of dropout on an H100 with XLA's cost model, without a GPU.

    pip install --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 \
        nvidia-cuda-nvcc nvidia-nvvm    # the compiler, of JAX's version; about 400 MB
    python -m benchmarks.gpu_model      # time over that of a copy, bfloat16

XLA compiles for a described GPU that need not be present, and records in the program the expected
time of each kernel. This program compares the sum over the kernels with that of `x * 1.5`. XLA uses
the same model to decide what to fuse. The model compares arithmetic with memory traffic and ignores
the time to launch a kernel. Nothing is timed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any

from benchmarks import cli, modelled
from parity_tests import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "gpu_model"
UNIT = "time"
# The plug-in only compiles; without this setting it would look for a GPU.
PLATFORMS = "cpu"
NOTE_COSTS = "--xla_gpu_collect_cost_model_stats=true"
COMPILER = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")
PLUGIN = "jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0} nvidia-cuda-nvcc nvidia-nvvm"
# An H100 SXM with 80 GB, as a GpuTargetConfigProto of XLA.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
"""
# Global shapes, and the axis that is sharded over the GPUs; None: every GPU has a copy.
LAYOUTS = (
    ((8192, 8192), None),
    ((8, 512, 4096), None),
    ((1, 2048, 2048), None),
    ((8, 512, 4096), 0),
    ((8, 512, 4096), 1),
    ((8, 512, 4096), 2),
)
NOTE = (
    "The bits of rbg keys come from XLA's Philox. The model charges about 400 operations per "
    "element for the concatenation of its outputs, so these figures are probably too high."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the table, and write it as JSON, Markdown and a picture."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, modelled.load, draw)
    if line := missing():
        print(line)
        return 0
    # The plug-in reads these once, when jax is imported.
    os.environ["JAX_PLATFORMS"] = PLATFORMS
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NOTE_COSTS}".strip()
    kinds = [f"H100:{options.gpus}"]
    rows = modelled.measure(kinds, devices, microseconds, LAYOUTS)
    print(modelled.save(options.out / NAME, rows, COMPILER, draw, UNIT, NOTE))
    print(f"Table, JSON and picture: {options.out}")
    return 0


def missing() -> str:
    """Return why there is no compiler for GPUs, or an empty string."""
    if any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        return ""
    packages = PLUGIN.format(version("jaxlib"))
    return f"skipped: JAX's CUDA plug-in is not installed. pip install --no-deps {packages}"


def draw(record: modelled.Record) -> Figure:
    """Draw the time of each candidate over that of a copy."""
    return modelled.draw(record, UNIT)


def _parser() -> cli.Parser:
    parser = cli.Parser(NAME, __doc__)
    text = "number of GPUs (default: %(default)s)"
    parser.add_argument("--gpus", type=output.integer(1), default=4, metavar="N", help=text)
    return parser


def devices(kind: str) -> Sequence[Any]:
    """Return the GPUs of a name such as "H100:4", which need not be present.

    A single number is that of the GPUs of one host; "H100:1x64x8" is 64 hosts with 8 GPUs each.
    """
    from jax.experimental import topologies

    grid = kind.removeprefix("H100:")
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=H100,
        topology=grid if "x" in grid else f"1x1x{grid}",
    ).devices


def microseconds(program: str) -> float:
    """Return the time that XLA expects for all kernels of a program.

    Raises:
        ValueError: A kernel has no estimate, which would make the sum too small.
    """
    # Each kernel has several estimates; XLA bases fusion on the first.
    costs = re.findall(r'"reification_cost":\[\{[^}]*?"exec_time_us":([\d.e+-]+)', program)
    kernels = len(re.findall(r"= .*\b(?:fusion|custom-call|while|sort)\(", program))
    if len(costs) < kernels:
        raise ValueError(
            f"program must have an estimate for each of its {kernels} kernels; got {len(costs)}. "
            f"Set XLA_FLAGS={NOTE_COSTS} before the import of jax."
        )
    return sum(map(float, costs))


def step_microseconds(program: str) -> float:
    """Return the time that XLA expects for all kernels of a training step, without collectives.

    The estimate of XLA's fusion has no tensor cores, and is far too high for the Triton kernel of a
    softmax. This sum takes the lowest estimate of a matrix product, about that of a kernel at the
    peak rate, and for a softmax the one that counts memory accesses. Shares of other kernels are
    therefore upper bounds.
    """
    total = 0.0
    for line in program.splitlines():
        found = re.search(r'fusion\(.*"reification_cost":\[(\{.*?\})\]', line)
        if found is None:
            continue
        estimates = re.findall(r'"exec_time_us":([\d.e+-]+).*?"name":"([^"]*)"', found[1])
        by_name = {name: float(time) for time, name in estimates}
        if '"kind":"__triton_nested_gemm_fusion"' in line:
            total += min(by_name.values())
        elif '"kind":"__triton"' in line:
            total += by_name["indexing-cost-model"]
        else:
            total += float(estimates[0][0])
    return total


if __name__ == "__main__":
    output.run(main)
