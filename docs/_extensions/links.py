"""Links from code in docstrings and pages to this reference and to that of other projects."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from inventories import UNDOCUMENTED
from names import FOREIGN, OWN, argument_names, target
from sphinx import addnodes
from sphinx.ext.intersphinx import resolve_reference_detect_inventory
from sphinx.transforms import SphinxTransform

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


def _code_role(name, rawtext, text, lineno, inliner, options=None, content=()) -> Any:
    """Return code with the module and the class of the docstring that contains it."""
    context = inliner.document.settings.env.ref_context
    literal = nodes.literal(rawtext, nodes.unescape(text))
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
            name = target(literal.astext(), argument_names())
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
    domain = env.domains.python_domain
    here = domain.resolve_xref(env, node["refdoc"], app.builder, "class", name, node, contnode)
    return here or resolve_reference_detect_inventory(env, node, contnode)


def setup(app) -> dict[str, Any]:
    """Register the role of docstrings and the transform."""
    app.add_role("code-or-link", _code_role)
    app.add_transform(_LinkCode)
    app.connect("missing-reference", _resolve, priority=400)  # before intersphinx
    return {"parallel_read_safe": True, "parallel_write_safe": True}
