"""Inventories of other projects' documentation, so that a build can link to it without network.

    python docs/inventories.py    # writes docs/inventories/*.inv

Each table lists the names that the docstrings and pages of this project mention, by the page that
documents them. The pages come from the sources of each project's documentation, which were read on
2026-11-28; the paths below are those of the sources. A page of one name needs no anchor, so that a
different one cannot break the link. Every name must exist in the installed package.

A name that the build does not find belongs into one of the tables, or into `UNDOCUMENTED`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import zlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from parity_tests import output

FOLDER = Path(__file__).parent / "inventories"


class Project(NamedTuple):
    """The documentation of a project.

    Attributes:
        site: The address of its pages.
        package: The distribution whose version the inventory records; empty for Python.
        pages: The names on each page, separated by spaces; `{name}` is replaced by each of them.
    """

    site: str
    package: str
    pages: dict[str, str]


PROJECTS = {
    # docs/conf.py sets autosummary_generate, and docs/jax*.rst list most names with
    # `:toctree: _autosummary`. The others are entries of the page itself.
    "jax": Project(
        "https://docs.jax.dev/en/latest/",
        "jax",
        {
            "_autosummary/{name}.html": """
                jax.Array jax.checkpoint jax.custom_jvp jax.custom_vjp jax.debug.callback
                jax.debug.print jax.device_put jax.enable_x64 jax.eval_shape jax.grad jax.hessian
                jax.jit jax.jvp jax.lax.axis_index jax.lax.cond jax.lax.optimization_barrier
                jax.lax.reduce_precision jax.lax.scan jax.lax.while_loop jax.linearize
                jax.make_mesh jax.named_scope jax.nn.dot_product_attention jax.numpy.abs
                jax.numpy.where jax.pmap jax.random.bernoulli jax.random.bits jax.random.clone
                jax.random.fold_in jax.random.key jax.random.key_data jax.random.normal
                jax.random.PRNGKey jax.random.split jax.random.wrap_key_data jax.set_mesh
                jax.ShapeDtypeStruct jax.shard_map jax.tree.leaves jax.tree.map
                jax.typing.ArrayLike jax.typing.DTypeLike jax.value_and_grad jax.vmap""",
            "jax.lax.html#{name}": "jax.lax.Precision",
            "jax.sharding.html#{name}": """
                jax.sharding.NamedSharding jax.sharding.PartitionSpec jax.sharding.Sharding""",
            "{name}.html#module-{name}": "jax.export jax.random",
        },
    ),
    # docs/api/*.rst list the names with `:toctree: generated/`; schedules under optax.schedules.
    "optax": Project(
        "https://optax.readthedocs.io/en/latest/",
        "optax",
        {
            "api/generated/{name}.html": """
                optax.adadelta optax.adafactor optax.adagrad optax.adam optax.adamax optax.adamw
                optax.add_decayed_weights optax.amsgrad optax.apply_updates optax.chain
                optax.clip_by_global_norm optax.contrib.muon optax.contrib.split_real_and_imaginary
                optax.ema optax.EmaState optax.FactoredState optax.GradientTransformation
                optax.identity optax.masked optax.MultiSteps optax.nadam optax.named_chain
                optax.partition optax.radam optax.rmsprop optax.rprop optax.scale
                optax.scale_by_adam optax.scale_by_adamax optax.scale_by_factored_rms
                optax.scale_by_learning_rate optax.scale_by_rss optax.ScaleByAdaDeltaState
                optax.ScaleByAdamState optax.ScaleByAmsgradState optax.ScaleByRmsState
                optax.ScaleByRssState optax.ScaleByRStdDevState optax.ScaleByScheduleState optax.sgd
                optax.trace optax.TraceState""",
            "api/generated/optax.schedules.{last}.html": """
                optax.cosine_decay_schedule optax.cosine_onecycle_schedule
                optax.exponential_decay optax.inject_hyperparams optax.linear_schedule
                optax.warmup_cosine_decay_schedule""",
            "api/generated/optax.tree_utils.tree_get.html": "optax.tree.get",
        },
    ),
    # docs/source/nn.md, nn.functional.md, optim.md, torch.md and func.api.md list the names with
    # `:toctree: generated`; checkpoint.md, optim.md, tensors.md and tensor_attributes.md have
    # entries of their own.
    "torch": Project(
        "https://docs.pytorch.org/docs/stable/",
        "torch",
        {
            "generated/{name}.html": """
                torch.abs torch.bernoulli torch.compile torch.empty torch.func.functional_call
                torch.func.vmap torch.Generator torch.get_rng_state torch.linspace
                torch.manual_seed torch.multinomial torch.nn.AlphaDropout
                torch.nn.Dropout torch.nn.Dropout1d
                torch.nn.Dropout2d torch.nn.Dropout3d
                torch.nn.FeatureAlphaDropout torch.nn.functional.alpha_dropout
                torch.nn.functional.dropout torch.nn.functional.dropout1d
                torch.nn.functional.feature_alpha_dropout
                torch.nn.functional.scaled_dot_product_attention torch.nn.GRU torch.nn.LSTM
                torch.nn.Module torch.nn.MultiheadAttention torch.nn.RNN torch.nn.Transformer
                torch.nn.utils.clip_grad_norm_
                torch.optim.Adadelta torch.optim.Adafactor torch.optim.Adagrad torch.optim.Adam
                torch.optim.Adamax torch.optim.AdamW torch.optim.ASGD
                torch.optim.lr_scheduler.CosineAnnealingLR torch.optim.lr_scheduler.ExponentialLR
                torch.optim.lr_scheduler.LambdaLR torch.optim.lr_scheduler.LinearLR
                torch.optim.lr_scheduler.LRScheduler torch.optim.lr_scheduler.StepLR
                torch.optim.Muon torch.optim.NAdam torch.optim.RAdam torch.optim.RMSprop
                torch.optim.Rprop torch.optim.SGD torch.rand torch.randint torch.randn
                torch.randperm torch.save torch.sqrt torch.where""",
            "checkpoint.html": "torch.utils.checkpoint",
            "cuda.html": "torch.cuda",
            "data.html": "torch.utils.data",
            "data.html#{name}": """
                torch.utils.data.DataLoader torch.utils.data.RandomSampler
                torch.utils.data.SubsetRandomSampler torch.utils.data.WeightedRandomSampler
                torch.utils.data.distributed.DistributedSampler torch.utils.data.random_split""",
            "func.api.html#module-torch.func": "torch.func",
            "generated/torch.Generator.html#{name}": "torch.Generator.get_state",
            "nn.html#module-torch.nn": "torch.nn",
            "nn.init.html": "torch.nn.init",
            "nn.init.html#{name}": """
                torch.nn.init.calculate_gain torch.nn.init.kaiming_normal_
                torch.nn.init.kaiming_uniform_ torch.nn.init.orthogonal_ torch.nn.init.sparse_
                torch.nn.init.trunc_normal_ torch.nn.init.xavier_normal_
                torch.nn.init.xavier_uniform_""",
            "optim.html#module-torch.optim": "torch.optim",
            "optim.html#how-to-adjust-learning-rate": "torch.optim.lr_scheduler",
            "optim.html#{name}": "torch.optim.Optimizer",
            "tensor_attributes.html#{name}": "torch.device torch.dtype",
            "tensors.html#{name}": "torch.Tensor",
        },
    ),
    # doc/source/reference/arrays.scalars.rst; arrays.ndarray.rst and
    # routines.array-manipulation.rst list the others with `:toctree: generated/`.
    "numpy": Project(
        "https://numpy.org/doc/stable/",
        "numpy",
        {
            "reference/arrays.scalars.html#{name}": "numpy.number",
            "reference/arrays.scalars.html": "numpy.bool",
            "reference/generated/{name}.html": "numpy.ndarray numpy.transpose",
        },
    ),
    # docs_nnx/api_reference/flax.nnx/*.rst
    "flax": Project(
        "https://flax.readthedocs.io/en/latest/",
        "flax",
        {
            "api_reference/flax.nnx/graph.html#{name}": """
                flax.nnx.merge flax.nnx.split flax.nnx.state flax.nnx.update""",
            "api_reference/flax.nnx/module.html#{name}": """
                flax.nnx.Module flax.nnx.view flax.nnx.view_info""",
            "api_reference/flax.nnx/nn/attention.html#{name}": "flax.nnx.MultiHeadAttention",
            "api_reference/flax.nnx/nn/stochastic.html#{name}": "flax.nnx.Dropout",
            "api_reference/flax.nnx/rnglib.html#{name}": "flax.nnx.Rngs",
            "api_reference/flax.nnx/state.html#{name}": "flax.nnx.State flax.nnx.merge_state",
            "api_reference/flax.nnx/summary.html#{name}": "flax.nnx.tabulate",
            "api_reference/flax.nnx/transforms.html#{name}": """
                flax.nnx.grad flax.nnx.scan flax.nnx.vmap""",
            "api_reference/flax.nnx/training/optimizer.html#flax.nnx.optimizer.Optimizer": """
                flax.nnx.Optimizer""",
            "api_reference/flax.nnx/variables.html#{name}": """
                flax.nnx.Perturbation flax.nnx.Variable""",
        },
    ),
    # docs/api_reference/flax.linen/*.rst
    "flax-linen": Project(
        "https://flax-linen.readthedocs.io/en/latest/",
        "flax",
        {
            "api_reference/flax.linen/layers.html#{name}": """
                flax.linen.dot_product_attention flax.linen.Dropout
                flax.linen.MultiHeadDotProductAttention""",
            "api_reference/flax.linen/module.html#{name}": "flax.linen.Module",
            "api_reference/flax.linen/transformations.html#{name}": "flax.linen.scan",
            "api_reference/{name}.html#module-{name}": "flax.serialization",
        },
    ),
    # docs/api/**/*.md have a `:::` entry for each name; MkDocs makes a folder of each page.
    "equinox": Project(
        "https://docs.kidger.site/equinox/",
        "equinox",
        {
            "api/manipulation/#{name}": """
                equinox.apply_updates equinox.filter equinox.partition equinox.tree_at""",
            "api/module/module/#{name}": "equinox.Module",
            "api/nn/attention/#{name}": "equinox.nn.MultiheadAttention",
            "api/nn/dropout/#{name}": "equinox.nn.Dropout",
            "api/nn/inference/#{name}": "equinox.nn.inference_mode",
            "api/nn/stateful/#{name}": "equinox.nn.make_with_state",
            "api/serialisation/#{name}": "equinox.tree_serialise_leaves",
            "api/transformations/#{name}": """
                equinox.filter_grad equinox.filter_jit equinox.filter_vmap""",
        },
    ),
    # docs/api.rst
    "haiku": Project(
        "https://dm-haiku.readthedocs.io/en/latest/",
        "dm-haiku",
        {"api.html#{name}": "haiku.dropout haiku.dynamic_unroll haiku.next_rng_key"},
    ),
    # The inventory of Python 3.11's documentation has these pages.
    "python": Project(
        "https://docs.python.org/3/",
        "",
        {
            "library/collections.abc.html#{name}": """
                collections.abc.Callable collections.abc.Hashable collections.abc.Iterable
                collections.abc.Iterator collections.abc.Mapping collections.abc.Sequence""",
            "library/contextlib.html#{name}": "contextlib.AbstractContextManager",
            "library/exceptions.html#{name}": """
                AssertionError ImportError KeyError NotImplementedError RuntimeError TypeError
                ValueError""",
            "library/functions.html#{name}": "bool float int object type",
            "library/pathlib.html#{name}": "pathlib.Path",
            "library/stdtypes.html#{name}": "dict frozenset list set str tuple",
            "library/typing.html#{name}": "typing.Any typing.NamedTuple",
        },
    ),
}

# Names that the docstrings mention and that have no page of their own: they do not become links.
UNDOCUMENTED = """
    flax.nnx.capture jax.effects_barrier optax.MaskedNode optax.ScalarOrSchedule
    torch.default_generator torch.export torch.feature_alpha_dropout torch.feature_dropout
    torch.jit.script"""


def find(name: str) -> Any:
    """Return the object of a dotted name; raises if there is none."""
    path = name.split(".") if "." in name else ["builtins", name]
    for cut in range(len(path) - 1, 0, -1):
        try:
            target = importlib.import_module(".".join(path[:cut]))
        except ModuleNotFoundError:
            continue
        for part in path[cut:]:
            target = getattr(target, part)
        return target
    raise ModuleNotFoundError(f"{name} must belong to an installed package.")


def kind(target: Any) -> str:
    """Return the kind of an entry: an annotation finds classes only, other code every kind."""
    if inspect.ismodule(target):
        return "module"
    if inspect.isclass(target):
        return "exception" if issubclass(target, Exception) else "class"
    return "function" if inspect.isroutine(target) else "class"


def entries(project: Project) -> dict[str, tuple[str, str]]:
    """Return the kind and the page of each name, in alphabetical order."""
    found = {}
    for page, names in project.pages.items():
        for name in names.split():
            assert name not in found, f"{name} must be in one page."
            last = name.rpartition(".")[2]
            found[name] = (kind(find(name)), page.format(name=name, last=last))
    return dict(sorted(found.items()))


def write(name: str, project: Project) -> Path:
    """Write the inventory in version 2 of the format of Sphinx; return its path."""
    version = metadata.version(project.package) if project.package else "3"
    lines = [f"{key} py:{role} 1 {page} -\n" for key, (role, page) in entries(project).items()]
    header = (
        f"# Sphinx inventory version 2\n# Project: {name}\n# Version: {version}\n"
        "# The remainder of this file is compressed using zlib.\n"
    )
    path = FOLDER / f"{name}.inv"
    path.write_bytes(header.encode() + zlib.compress("".join(lines).encode(), 9))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Write all inventories."""
    output.Parser("python docs/inventories.py", __doc__).parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    for title, listed in PROJECTS.items():
        sys.stdout.write(f"written: {write(title, listed)}\n")


if __name__ == "__main__":
    output.run(main)
