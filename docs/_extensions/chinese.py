"""Chinese pages on an English site: their language attribute, and the search for their words."""

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

_CHINESE = re.compile(r"[\u4e00-\u9fff]+")


class SearchEnglishAndChinese(SearchEnglish):
    """Index Chinese text by its characters and pairs of them, since it has no spaces.

    A query is split into the same pairs, and finds the pages that contain each of them.
    """

    js_splitter_code = r"""
var splitQuery = (query) => {
  const chinese = [];
  const others = query.replace(/[\u4e00-\u9fff]+/g, (run) => {
    if (run.length === 1) chinese.push(run);
    for (let i = 0; i + 1 < run.length; i++) chinese.push(run.slice(i, i + 2));
    return " ";
  });
  return [...others.split(/[^\p{Letter}\p{Number}_]+/u).filter(Boolean), ...chinese];
};
"""

    def split(self, input: str) -> list[str]:  # noqa: A002 - Sphinx's name
        """Return the words of a text that the index contains."""
        runs = _CHINESE.findall(input)
        pairs = [run[i : i + 2] for run in runs for i in range(len(run) - 1)]
        return [*super().split(_CHINESE.sub(" ", input)), *"".join(runs), *pairs]


def _set_language(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Mark the Chinese pages, so that browsers choose Chinese fonts and voices."""
    if pagename.startswith("lesson_zh/"):
        context["language"] = "zh-CN"


def setup(app: Sphinx) -> dict[str, Any]:
    """Replace the search language of the site, and mark the Chinese pages."""
    app.add_search_language(SearchEnglishAndChinese)
    app.connect("html-page-context", _set_language)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
