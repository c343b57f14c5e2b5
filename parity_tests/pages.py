"""The style of the HTML pages that programs write, which are single files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from parity_tests import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem }}
body {{ margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 14px; width: 100% }}
th, td {{ border-bottom: 1px solid #ccc; padding: .35rem .6rem; text-align: left }}
th {{ vertical-align: bottom }} td {{ vertical-align: top }}
dd {{ overflow-wrap: anywhere }}
.agrees {{ color: #00602b }} .differs {{ color: #b00020; font-weight: bold }}
.incomplete {{ color: #7a4a00; font-weight: bold }}
.skipped {{ color: #666 }} img {{ max-width: 100% }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def page(title: str, body: str) -> str:
    """Return a page with a heading; `body` is HTML."""
    return _PAGE.format(title=html.escape(title), body=body)


def table(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table; a row is its class and its cells, of which the first is its heading."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headings)
    lines = [
        f'<tr class="{kind}"><th scope="row">{html.escape(cells[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells[1:])
        + "</tr>"
        for kind, cells in rows
    ]
    body = "\n".join(lines)
    # A region that scrolls must be reachable by keyboard.
    return (
        f'<div class="wide" role="region" aria-label="Results" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def definitions(items: Sequence[tuple[str, str]]) -> str:
    """Return a list of terms and their descriptions."""
    lines = [f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in items]
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def image(figure: Figure, text: str) -> str:
    """Return a picture inside of the page; `text` describes it."""
    source = base64.b64encode(pictures.png(figure)).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{source}">'
