"""Puts the study's tables into the pages that tell of them.

    python -m studies.pages

A table or sentence stands between `<!-- study NAME -->` and `<!-- end -->`;
names are those of `pieces`.
"""

import pathlib
import re

from studies import methods_table, parts, plans, rows, tables
from studies.comparisons import Row

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README.md", "guides/study.md", "guides/methods.md")
MARK = re.compile(
    r"(<!-- study (?P<name>\S+) -->)(?P<inner>.*?)(<!-- end -->)",
    re.DOTALL,
)


def main() -> None:
    """Rewrites the pages, from the committed rows."""
    found = pieces(rows.read(parts.RESULTS))
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text(), found))
        print(path)


def filled(page: str, found: dict[str, str]) -> str:
    """A page with its tables as the rows have them.

    Args:
        page: Markdown.
        found: What `pieces` gives.

    Raises:
        KeyError: For a name that there is not.
    """

    def replaced(match):
        return f"{match[1]}\n\n{found[match['name']]}\n\n{match[4]}"

    return MARK.sub(replaced, page)


def pieces(found: list[Row]) -> dict[str, str]:
    """Every table and sentence for which there are rows, by name.

    Args:
        found: Rows of all studies.

    Returns:
        Names such as `"language:headline"`, as of `tables.pieces`.
    """
    made = {
        f"{study}:{name}": text
        for study, make in plans.PLANS.items()
        for name, text in tables.pieces(found, make()).items()
    }
    return {**made, "methods:table": methods_table.table(found)}


if __name__ == "__main__":
    main()
