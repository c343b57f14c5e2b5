"""Rules for imports: their direction, and forbidden ones."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The layers of each package, from the lowest. A module imports from its own layer and from those
# before it. A layer is a folder or a file; every module may import `regshared`.
ROOMS = {
    "regshared": ["regshared"],
    "regjax": [
        "_compat",
        "_checks",
        "_random",
        "_decay",
        "_dropout",
        "torch_random",
        "_layers",
        "_guards",
        "_certificate",
        "_mc_dropout",
        "optim",
        "interop",
        "keyed",
        "__init__",
        "__main__",
        "_peers",
        "linen",
        "nnx",
        "equinox",
        "haiku",
    ],
    "regtorch": [
        "_checks",
        "_random",
        "_decay",
        "_dropout",
        "nn",
        "keyed",
        "_guards",
        "_mc_dropout",
        "optim",
        "__init__",
        "__main__",
    ],
}
PACKAGES = ["regjax", "regtorch"]
FOREIGN = {
    "regshared": {"jax", "jaxlib", "optax", "numpy", "torch", "regjax", "regtorch", "flax"},
    "regjax": {"torch", "flax", "equinox", "haiku", "regtorch", "parity_tests", "jaxtyping"},
    "regtorch": {"jax", "jaxlib", "optax", "numpy", "regjax", "parity_tests"},
}
# The files for a framework, the only ones that may import it; they must not import each other.
# (Those for Haiku are functions, and need no Haiku.)
LAYERS = {"linen": "flax", "nnx": "flax", "equinox": "equinox", "haiku": None}
FRAMEWORKS = LAYERS | {f"keyed.{name}": LAYERS[name] for name in ("linen", "nnx", "equinox")}


def imports(source: str) -> set[str]:
    """Return the modules that a file imports at run time, without those under `TYPE_CHECKING`."""
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


def files(package: str) -> list[str]:
    """Return the files of a package by dotted module name, including `__init__` files."""
    paths = (path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py"))
    return sorted(".".join(path.with_suffix("").parts) for path in paths)


def source_of(package: str, name: str) -> str:
    return (ROOT / package).joinpath(*name.split(".")).with_suffix(".py").read_text()


def room(package: str, name: str) -> int:
    """Return the number of the layer of a module."""
    return 0 if package == "regshared" else ROOMS[package].index(name.partition(".")[0])


def within(package: str, source: str) -> set[str]:
    """Return the modules of its own package that a file imports."""
    found, known = imports(source), files(package)
    targets = {target.removeprefix(f"{package}.") for target in found if f"{package}." in target}
    targets |= {"__init__"} if package in found and f"import {package}\n" in source else set()
    return {t for target in targets for t in (target, f"{target}.__init__") if t in known}


def climbing(package: str, name: str, source: str) -> set[str]:
    """Return the imports of a file from higher layers, or between files for frameworks."""
    mine = room(package, name)
    return {
        target
        for target in within(package, source)
        if room(package, target) > mine
        or (name in LAYERS and target in LAYERS and target != name and package == "regjax")
    }


def foreign(package: str, name: str, source: str) -> set[str]:
    """Return the frameworks that a file must not import, but does."""
    own = {FRAMEWORKS[name]} if package == "regjax" and name in FRAMEWORKS else set()
    return {target.partition(".")[0] for target in imports(source)} & FOREIGN[package] - own


@pytest.mark.parametrize("package", ROOMS)
def test_arrows_run_down_only(package):
    sources = {name: source_of(package, name) for name in files(package)}
    assert {name for name in sources if climbing(package, name, sources[name])} == set()
    assert {name for name in sources if foreign(package, name, sources[name])} == set()
    # Within a layer, any order without cycles is valid.
    graph = {name: within(package, source) for name, source in sources.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("package", PACKAGES)
def test_init_only_re_exports(package):
    tree = ast.parse(source_of(package, "__init__"))
    *code, last = [
        n for n in tree.body if not isinstance(n, ast.ImportFrom | ast.Expr | ast.Assign)
    ]
    assert isinstance(last, ast.FunctionDef)
    assert last.name == "__dir__"
    # regtorch first checks that torch is installed.
    assert [type(node) for node in code] == [ast.With] * (package == "regtorch")


def test_both_packages_have_the_same_files():
    def private(package: str) -> set[str]:
        return {name for name in files(package) if name.startswith("_")}

    only_jax = {"_certificate", "_compat", "_layers", "_peers", "_random.xla"}
    # The kernels for TPUs and GPUs.
    kernels = (
        "flash",
        "flash_tiles",
        "flash_triton",
        "kernel_choice",
        "kernels",
        "pallas_attention",
        "triton_dropout",
    )
    only_jax |= {f"_dropout.{name}" for name in kernels}
    only_jax |= {"_random.tiles"}
    only_torch = {"_dropout.dtensor"}  # a mask of JAX has the sharding of its array
    assert private("regjax") - only_jax == private("regtorch") - only_torch


def test_arrows_that_climb_are_seen():
    """Test of the test."""
    up = "from regjax._dropout.core import dropout"
    assert climbing("regjax", "_random.keys", up) == {"_dropout.core"}
    assert climbing("regjax", "_random.keys", "import regjax\n") == {"__init__"}
    assert not climbing("regjax", "_dropout.core", "from regjax._random import bernoulli")
    assert climbing("regjax", "nnx", "from regjax import linen") == {"linen"}
    assert imports("if TYPE_CHECKING:\n    import torch") == set()
    assert foreign("regjax", "_dropout.core", "from flax import linen") == {"flax"}
    assert foreign("regjax", "nnx", "from flax import nnx\nimport haiku") == {"haiku"}
    assert foreign("regshared", "report", "import numpy") == {"numpy"}
    assert not foreign("regjax", "nnx", "from flax import nnx")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


VERSIONED = {
    "InconclusiveDimensionOperation",
    "__version__",
    "__version_info__",
    "make_user_context",
}


def version_switches(source: str) -> set[str]:
    """Return the lines that depend on a version, or on names that not all versions of JAX have."""
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
    switches = {name: version_switches(source_of("regjax", name)) for name in files("regjax")}
    assert [name for name, found in switches.items() if found] == ["_compat"]


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
    """Test of the test."""
    assert version_switches(source)
    assert not version_switches("x = getattr(module, 'rate')\ny = jax.typeof(x).sharding")


def test_one_file_holds_the_workarounds_for_xla():
    words = ("optimization_barrier(", "platform_dependent(", "reduce_precision(")
    found = {name: source_of("regjax", name) for name in files("regjax")}
    users = [name for name, source in found.items() if any(word in source for word in words)]
    assert users == ["_random.xla"]


def test_arguments_are_checked_in_one_place():
    """The errors of `operator.index` do not contain the name of the argument."""
    users = [
        f"{package}.{name}"
        for package in ROOMS
        for name in files(package)
        if "operator.index" in source_of(package, name)
    ]
    assert users == ["regshared.checks"]


def loaded_after(*statements: str) -> list[set[str]]:
    """Return the top-level modules in a new interpreter after each of several statements."""
    show = "print(*{name.partition('.')[0] for name in sys.modules})"
    code = "\n".join(["import sys", *(f"{statement}\n{show}" for statement in statements)])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return [set(line.split()) for line in result.stdout.splitlines()]


# One interpreter per package suffices, since the modules are recorded after each statement.
LATER = {
    "regjax": [*(f"import regjax.{name}" for name in LAYERS), "import torch"],
    "regtorch": [],
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_does_not_load_the_other_framework(package):
    loaded, *later = loaded_after(f"import {package}", *LATER[package])
    assert package in loaded
    if package == "regjax":
        *layers, with_torch = later
        assert "torch" in with_torch  # test of the test
        # The layers for a framework load it when they are imported.
        for framework, after in zip(LAYERS.values(), layers, strict=True):
            assert framework is None or framework in after
    # torch loads NumPy if it is installed; regtorch does not require it.
    assert not loaded & (FOREIGN[package] - {"numpy"})


@pytest.mark.slow
def test_every_module_can_be_imported_with_the_names_of_its_annotations():
    """No module imports another one in a circle, not even for annotations."""
    pytest.importorskip("beartype")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.types_plugin"]
    subprocess.run([*command, "tests/test_globs.py"], cwd=ROOT, check=True, timeout=300)
