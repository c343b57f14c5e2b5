"""Links from code in docstrings and pages to the reference, here and on the sites of other projects.

Docstrings have Markdown's single backticks, and pages have code spans. Their code becomes a link in
two cases:

- It is a dotted name, or a call of one, that begins with a known package. The name must exist.
- In a docstring, it is the name of an object of the same module, and not that of an argument, such
  as `key`. With parentheses, as in `key(0)`, it always denotes the function.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

from docutils import nodes
from inventories import UNDOCUMENTED
from sphinx import addnodes
from sphinx.ext.intersphinx import resolve_reference_detect_inventory
from sphinx.transforms import SphinxTransform

OWN = ("parity_tests", "regjax", "regtorch")
FOREIGN = ("equinox", "flax", "haiku", "jax", "numpy", "optax", "torch")
ALIASES = {
    "eqx": "equinox",
    "hk": "haiku",
    "interop": "regjax.interop",
    "jnp": "jax.numpy",
    "np": "numpy",
    "nnx": "flax.nnx",
}

# Annotations are not evaluated, so they have the names of the files that contain them.
TYPES = {
    "Any": "typing.Any",
    "Array": "jax.Array",
    "ArrayLike": "jax.typing.ArrayLike",
    "DTypeLike": "jax.typing.DTypeLike",
    "Module": "torch.nn.Module",
    "Optimizer": "torch.optim.Optimizer",
    "Tensor": "torch.Tensor",
    "nn.Module": "flax.linen.Module",
    "np.ndarray": "numpy.ndarray",
    "torch._C.Generator": "torch.Generator",
    "flax.linen.module.Module": "flax.linen.Module",
    "flax.linen.stochastic.Dropout": "flax.linen.Dropout",
    "flax.nnx.module.Module": "flax.nnx.Module",
    "flax.nnx.nn.stochastic.Dropout": "flax.nnx.Dropout",
    "regjax._random.bernoulli.Sampler": "Sampler",
    "regtorch._random.bernoulli.Sampler": "Sampler",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
}


def argument_names(modules: list[str]) -> set[str]:
    """Return the names of all arguments of the public functions and methods of the modules."""
    names: set[str] = set()
    for module in map(importlib.import_module, modules):
        for value in (getattr(module, name) for name in module.__all__):
            methods = vars(value).values() if inspect.isclass(value) else ()
            for function in filter(callable, (value, *methods)):
                try:
                    names.update(inspect.signature(function).parameters)
                except (TypeError, ValueError):  # not every built-in method has a signature
                    continue
    return names


def target(code: str, arguments: Collection[str] = ()) -> str | None:
    """Return the name that code links to, or None if it is not a name or that of an argument."""
    try:
        node: Any = ast.parse(code.replace("…", "..."), mode="eval").body
    except SyntaxError:
        return None
    parts: list[str] = []
    is_call = False
    while not isinstance(node, ast.Name):
        match node:
            case ast.Call(func=function):  # the link is to the first function of a chain of calls
                node, parts, is_call = function, [], True
            case ast.Subscript(value=value):
                node, parts = value, []
            case ast.Attribute(value=value, attr=attribute):
                node, parts = value, [attribute, *parts]
            case _:
                return None
    if not parts and node.id in arguments and not is_call:
        return None
    return ".".join([ALIASES.get(node.id, node.id) if parts else node.id, *parts])


def _code_role(name, rawtext, text, lineno, inliner, options=None, content=()) -> Any:
    """Return code with the module and the class of the docstring that contains it."""
    context = inliner.document.settings.env.ref_context
    literal = nodes.literal(rawtext, nodes.unescape(text), classes=["code"])
    literal["context"] = {part: context.get(part) for part in ("py:module", "py:class")}
    return [literal], []


class _LinkCode(SphinxTransform):
    """Replace code that is a name by a link; GitHub shows the same pages without the links."""

    default_priority = 500

    def apply(self, **kwargs) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            context = literal.attributes.pop("context", None)
            if isinstance(literal.parent, (addnodes.pending_xref, nodes.reference)):
                continue
            name = target(literal.astext(), self.app.argument_names)
            if name is None:
                continue
            dotted = name.startswith(tuple(f"{package}." for package in (*OWN, *FOREIGN)))
            if dotted or context is not None:
                link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=name)
                link.update_all_atts({"refdoc": self.env.docname, **(context or {})})
                link["optional"] = not dotted or name in UNDOCUMENTED.split()
                literal.replace_self(link)
                link += literal


def _resolve(app, env, node, contnode) -> nodes.Element | None:
    """Resolve the short name of a type in a signature; leave code that is no name as it is."""
    if node.get("optional"):
        return contnode
    name = TYPES.get(node.get("reftarget"))
    if node.get("refdomain") != "py" or name is None:
        return None
    node["reftarget"] = name
    return resolve_reference_detect_inventory(env, node, contnode)


def _find_arguments(app) -> None:
    pages = Path(app.srcdir, "api").glob("*.md")
    app.argument_names = argument_names([page.stem for page in pages if page.stem not in ("index", "types")])


def setup(app) -> dict[str, Any]:
    """Register the role of docstrings and the transform."""
    app.add_role("code-or-link", _code_role)
    app.add_transform(_LinkCode)
    app.connect("builder-inited", _find_arguments)
    app.connect("missing-reference", _resolve, priority=400)  # before intersphinx
    return {"parallel_read_safe": True, "parallel_write_safe": True}
