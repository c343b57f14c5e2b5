"""Write the fonts of the Chinese plot labels: the characters of each page's TEXT, in two weights.

Matplotlib has no font with Chinese characters, and the lesson must not depend on an installed one.
Run this program after adding a character to a label. The source fonts are Noto Sans CJK SC, from
https://github.com/notofonts/noto-cjk or a system package, and have the SIL Open Font License 1.1,
which also applies to the fonts that this program writes.

    python docs/lesson_zh/label_fonts.py NotoSansCJK-Regular.ttc NotoSansCJK-Bold.ttc
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

from parity_tests import output

HERE = Path(__file__).parent
FAMILY = "Lesson Labels"  # a name of its own, so that no installed font takes its place
LICENSE_NAMES = {0, 13, 14}  # copyright, license, and the address of the license


def label_characters() -> str:
    """Return the characters of all labels that are not ASCII, sorted."""
    tables = [
        re.search(r"^TEXT = \{.*?^\}", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for page in HERE.glob("*_*.md")
    ]
    return "".join(sorted({c for table in tables if table for c in table[0] if not c.isascii()}))


def write_font(source: Path, weight: str, characters: str) -> None:
    """Write the characters of a font to a font named `FAMILY`."""
    face = 2 if source.suffix == ".ttc" else -1  # of a collection, Simplified Chinese
    font = TTFont(source, fontNumber=face, recalcTimestamp=False)
    options = subset.Options()
    options.name_IDs = [*LICENSE_NAMES]
    options.layout_features = []
    options.notdef_outline = True
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=characters)
    subsetter.subset(font)
    for identifier, name in ((1, FAMILY), (2, weight), (4, f"{FAMILY} {weight}")):
        font["name"].setName(name, identifier, 3, 1, 0x409)
    font["name"].setName(f"LessonLabels-{weight}", 6, 3, 1, 0x409)
    font.save(HERE / f"labels-{weight.lower()}.otf")


def font_file(text: str) -> Path:
    """Convert the value of an argument to the path of a font."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be a file; got {text!r}. Download Noto Sans CJK.")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and write both fonts."""
    parser = output.Parser("python docs/lesson_zh/label_fonts.py", __doc__)
    for weight in ("Regular", "Bold"):
        text = f"font file of Noto Sans CJK SC {weight}"
        parser.add_argument(weight.lower(), type=font_file, help=text)
    arguments = parser.parse_args(argv)
    characters = label_characters()
    write_font(arguments.regular, "Regular", characters)
    write_font(arguments.bold, "Bold", characters)
    print(f"{len(characters)} characters: {characters}")


if __name__ == "__main__":
    output.run(main)
