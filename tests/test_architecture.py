"""The rules of the house: what imports what, and what must never be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = {"regjax": ROOT / "regjax", "regtorch": ROOT / "regtorch"}
FOREIGN = {
    "regjax": {"torch", "flax", "equinox", "haiku", "regtorch", "parity_tests", "jaxtyping"},
    "regtorch": {"jax", "jaxlib", "optax", "numpy", "regjax", "parity_tests"},
}
# The layers of a framework: each of these files may import its own, no other file any of them.
# (Those for Haiku are functions, and need no Haiku.)
LAYERS = {"linen": "flax", "nnx": "flax", "equinox": "equinox"}
# A file may import those of its own wing that stand on a lower floor than itself.
FLOORS = {
    "_checks": -1,
    "_compat": -1,
    "_threefry": 0,
    "_collect": -1,
    "_observe": 0,
    "_exact": 0,
    "_quantile_tables": 0,
    "_quantile": 1,
    "_findings": 1,
    "_guards": 2,
    "_keys": 1,
    "_masks": 2,
    "_packed": 3,
    "_normal": 2,
    "_schedules": 3,
    "_dropout": 3,
    "_paths": 0,
    "_decay": 1,
    "_penalty": 2,
    "_verdicts": 2,
    "_table": 3,
    "_rules": 4,
    "optim._gradients": 1,
    "optim._links": 2,
    "optim._decays": 3,
    "optim._descent": 3,
    "optim._adafactor": 3,
    "optim._adam": 3,
    "optim._muon": 3,
    "optim._rms": 3,
    "optim": 4,
    "optim.__init__": 4,
    "_features": 4,
    "_attention": 4,
    "interop._leaves": 4,
    "interop._schedules": 5,
    "interop._optimizers": 6,
    "interop._params": 6,
    "interop._states": 6,
    "interop.__init__": 7,
    "_alpha": 5,
    "_blocks": 4,
    "_depth": 4,
    "_noise": 4,
    "_embedding": 4,
    "_recurrent": 4,
    "_weights": 5,
    "nn._layer": 6,
    "nn._alpha": 7,
    "nn._blocks": 7,
    "nn._depth": 7,
    "nn._noise": 7,
    "nn._dropout": 7,
    "nn._embedding": 7,
    "nn._features": 7,
    "nn._recurrent": 7,
    "nn._weights": 7,
    "nn": 8,
    "nn.__init__": 8,
    "keyed_layers": 9,
    "keyed": 10,
    "_uncertainty": 11,
    "__init__": 12,
    "layers": 11,
    "linen": 12,
    "nnx": 12,
    "equinox": 12,
    "haiku": 12,
}


def imports(source: str) -> set[str]:
    """The modules that a file imports at run time: not those under `if TYPE_CHECKING`."""
    found = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            pending += ast.iter_child_nodes(node)
    return found


def climbing(wing: str, name: str, source: str) -> set[str]:
    """The files of its own wing that a file imports though they stand no lower than itself."""
    inside = {t.removeprefix(wing + ".") for t in imports(source) if t.startswith(wing + ".")}
    inside |= {f"{target}.__init__" for target in inside}  # a package is its __init__
    return {target for target in inside & FLOORS.keys() if FLOORS[target] >= FLOORS[name]}


def foreign(wing: str, name: str, source: str) -> set[str]:
    """The frameworks that a file imports though it may not."""
    own = {LAYERS[name]} if wing == "regjax" and name in LAYERS else set()
    return {target.partition(".")[0] for target in imports(source)} & FOREIGN[wing] - own


def files(wing: str) -> list[str]:
    paths = (path.relative_to(WINGS[wing]) for path in WINGS[wing].rglob("*.py"))
    return sorted(".".join(path.with_suffix("").parts) for path in paths)


def source_of(wing: str, name: str) -> str:
    return WINGS[wing].joinpath(*name.split(".")).with_suffix(".py").read_text()


@pytest.mark.parametrize(("wing", "name"), [(wing, name) for wing in WINGS for name in files(wing)])
def test_arrows_run_down_only(wing, name):
    assert not climbing(wing, name, source_of(wing, name))


@pytest.mark.parametrize("wing", WINGS)
def test_init_only_re_exports(wing):
    tree = ast.parse((WINGS[wing] / "__init__.py").read_text())
    assert all(isinstance(node, ast.ImportFrom | ast.Expr) for node in tree.body)


def test_the_core_files_have_the_same_names_in_both_wings():
    private = [{name for name in files(wing) if name.startswith("_")} for wing in WINGS]
    assert private[0] - {"_compat"} == private[1]


VERSIONED = {
    "InconclusiveDimensionOperation",
    "__version__",
    "__version_info__",
    "make_user_context",
}


def version_switches(source: str) -> set[str]:
    """Where a file looks at a version, or reaches for names that only some versions of JAX have."""
    found = {target for target in imports(source) if target.startswith("jax._src")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            is_private = ast.unparse(node).startswith("jax._src")
            is_version = node.attr in VERSIONED
            found |= {ast.unparse(node)} if is_private or is_version else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            module = ast.unparse(node.args[0])
            is_library = module.partition(".")[0] in ("jax", "jnp", "lax", "nnx", "eqx", "optax")
            is_fixed = isinstance(node.args[1], ast.Constant)
            found |= {ast.unparse(node)} if is_library and is_fixed else set()
        elif isinstance(node, ast.ExceptHandler) and node.type:
            caught = ast.unparse(node.type)
            found |= {f"except {caught}"} if "ImportError" in caught else set()
    return found


def test_one_file_holds_all_that_depends_on_the_version_of_jax():
    names = [name for name in files("regjax") if name != "_compat"]
    assert not {name: found for name in names if (found := version_switches_of(name))}
    assert version_switches_of("_compat")


def version_switches_of(name: str) -> set[str]:
    return version_switches(source_of("regjax", name))


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.config",
        "from jax._src import core",
        "x = jax._src.core.Tracer",
        "if jax.__version__ > '0.9': pass",
        "new = jax.__version_info__ >= (0, 9)",
        "x = getattr(jax, 'enable_x64', None)",
        "if hasattr(jax.sharding, 'reshard'): pass",
        "try:\n    from jax import enable_x64\nexcept ImportError: pass",
        "context = jax.make_user_context(None)",
        "try: x <= y\nexcept jax.errors.InconclusiveDimensionOperation: pass",
    ],
)
def test_a_version_switch_is_seen(source):
    """The test of the test."""
    assert version_switches(source)
    assert not version_switches("x = getattr(module, 'rate')\ny = jax.typeof(x).sharding")


@pytest.mark.parametrize("wing", WINGS)
def test_arguments_are_checked_in_one_place(wing):
    """An error of `operator.index` does not name the argument that is wrong."""
    sources = {name: source_of(wing, name) for name in files(wing)}
    users = [
        n for n, s in sources.items() if "operator.index" in s or "operator.index" in imports(s)
    ]
    assert users == ["_checks"]


def test_climbing_is_seen():
    """The test of the test."""
    assert climbing("regjax", "_keys", "from regjax._masks import bernoulli") == {"_masks"}
    assert climbing("regjax", "_keys", "from regjax import _dropout") == {"_dropout"}
    assert not climbing("regjax", "_dropout", "from regjax._masks import bernoulli")
    assert imports("if TYPE_CHECKING:\n    import torch") == set()


def loaded_after(*statements: str) -> list[set[str]]:
    """The top-level modules that a fresh interpreter holds after each of several statements."""
    show = "print(*{name.partition('.')[0] for name in sys.modules})"
    code = "\n".join(["import sys", *(f"{statement}\n{show}" for statement in statements)])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return [set(line.split()) for line in result.stdout.splitlines()]


# One interpreter for each wing: what comes later in a list cannot hide what an earlier import did.
LATER = {"regjax": [f"import regjax.{name}" for name in LAYERS] + ["import torch"], "regtorch": []}


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_does_not_load_the_other_framework(wing):
    loaded, *later = loaded_after(f"import {wing}", *LATER[wing])
    assert wing in loaded
    if wing == "regjax":
        *layers, with_torch = later
        assert "torch" in with_torch  # the test of the test
        # The layers of a framework load it when they are imported, and only then: see below.
        for framework, after in zip(LAYERS.values(), layers, strict=True):
            assert framework in after
    # torch itself loads NumPy where it is installed; regtorch does not ask for it.
    assert not loaded & (FOREIGN[wing] - {"numpy"})
    assert not [name for name in files(wing) if foreign(wing, name, source_of(wing, name))]


def test_a_foreign_framework_is_seen():
    """The test of the test."""
    assert foreign("regjax", "_dropout", "from flax import linen") == {"flax"}
    assert foreign("regjax", "nnx", "from flax import nnx\nimport haiku") == {"haiku"}
    assert not foreign("regjax", "nnx", "from flax import nnx")
