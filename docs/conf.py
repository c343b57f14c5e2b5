"""Settings of the documentation site; `make docs` builds it."""

import re
import sys
import tomllib
from pathlib import Path

from regshared import __version__

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS / "_extensions")]

from inventories import PROJECTS  # noqa: E402 - found on the path set above

project = "regjax"
author = project_copyright = "The regjax authors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "chinese",
    "links",
    "mathml",
]

intersphinx_mapping = {
    name: (project.site, f"inventories/{name}.inv") for name, project in PROJECTS.items()
}
intersphinx_disabled_reftypes = ["std:*"]  # headings and terms are those of this site

# These files are included by pages, or are written by programs and linked as files.
exclude_patterns = [
    "_build",
    "benchmarks",
    "exactness",
    "overfit",
    "parity",
    "sharded_lm",
    "uncertainty",
    "zoo",
]

# Docstrings have Markdown's single backticks.
default_role = "code-or-link"
autodoc_default_options = {"members": True, "show-inheritance": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # signatures have them
napoleon_use_ivar = True  # attributes become a list: as entries, dataclass fields would occur twice
napoleon_use_rtype = False  # a colon in a description separates no type
napoleon_custom_sections = [
    "In PyTorch",
    "In JAX",
    "Differences from Flax",
    "Differences from Haiku",
]
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Every reference must exist, except for:
nitpicky = True
nitpick_ignore_regex = [
    # private bases and type variables in signatures
    ("py:class", r".*\b_\w+.*"),
    # arrays of jaxtyping
    ("py:class", r"(float \| )?(Bool|Float|Inexact|Int|Int32|Integer|PyTree|UInt8|UInt32)\b.*"),
    # types that occur once
    ("py:class", r"ExampleSampler|Figure|enum\.Enum|flax\.core\.scope\.Scope|lax\.PrecisionLike"),
]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# The lesson runs once after each change of its pages; its `assert` statements stop the build.
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

html_baseurl = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["urls"][
    "Documentation"
]
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css", "math.css"]
html_title = f"regjax {release}"
copybutton_exclude = ".linenos, .gp, .go"  # copies the code of doctests, without their output

html_domain_indices = False  # the API reference lists the modules
html_js_files = ["site.js"]
html_logo = html_favicon = "_static/logo.svg"
pygments_dark_style = "a11y-dark"  # the dark twin of the theme's light style
templates_path = ["_templates"]


# Parts of Markdown in docstrings, which napoleon and reStructuredText do not know.
_DISPLAY = re.compile(r"^( *)\$\$(.+?)\$\$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"\$([^$]+?)\$")
_CODE_SPAN = re.compile(r"(`[^`]+`)(\w)?")  # with the first letter of an ending, as of a plural
_TABLE = re.compile(r"(?:^ *\|.*\n)+", re.MULTILINE)
_NOTE = re.compile(r"^( *)Note \((\w+)\):$", re.MULTILINE)  # napoleon allows letters only
_CODE_BLOCK = re.compile(r"^(\S.*)\n\n(?= {4})", re.MULTILINE)


def _markdown_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Translate formulas, tables and code blocks of a docstring, in place."""
    text = _DISPLAY.sub(lambda m: f"{m[1]}.. math:: {' '.join(m[2].split())}\n", "\n".join(lines))
    text = _INLINE.sub(r":math:`\1`", text)
    text = _CODE_SPAN.sub(lambda m: f"{m[1]}\\ {m[2]}" if m[2] else m[1], text)
    text = _TABLE.sub(lambda m: _list_table(m[0].splitlines()), text)
    text = _NOTE.sub(r"\1In \2:", text)
    if what == "module":  # elsewhere, indentation is that of a section
        text = _CODE_BLOCK.sub(r"\1\n\n::\n\n", text)
    lines[:] = text.split("\n")


def _list_table(rows: list[str]) -> str:
    indent = rows[0].partition("|")[0]
    table = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        first, *others = (cell.strip() for cell in row.strip().strip("|").split(" | "))
        table += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return "".join(f"{indent}{line}\n" for line in table)


def _skip_generated(app, what, name, obj, skip, options) -> bool | None:
    """Skip the fields of named tuples that have only a generated docstring."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def _make_parsable(app, what, name, obj, options, signature, returns) -> tuple | None:
    """Replace default values such as `<factory>` and `<function f>`, which Sphinx cannot parse."""
    default = re.compile(r"<(?:function (\w+)|[^>]+)>")
    return signature and (default.sub(lambda m: m[1] or "...", signature), returns)


def _link_sources_to_types(app, pagename, templatename, context, doctree) -> None:
    """Mend links of sources, whose names viewcode takes from one module: api/types has another."""
    if pagename.startswith("_modules/reg"):
        module = pagename.removeprefix("_modules/").replace("/", ".")
        context["body"] = context["body"].replace("types.html#regjax.", f"types.html#{module}.")


def setup(app) -> None:
    """Register the above, for docstrings before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", _markdown_to_rst, priority=400)
    app.connect("autodoc-process-signature", _make_parsable)
    app.connect("autodoc-skip-member", _skip_generated)
    app.connect("html-page-context", _link_sources_to_types)
