"""Tables for people: plain text and Markdown."""

import statistics
from collections.abc import Collection, Sequence


def spread(
    values: Collection[float], digits: int = 3, sign: bool = False
) -> str:
    """Mean and, of several values, their standard deviation.

    Args:
        values: Numbers.
        digits: After the point. Defaults to 3.
        sign: Whether a mean of 0 or more gets its sign.

    Example:
        >>> spread([1.0, 2.0], 2), spread([0.5], 1, sign=True)
        ('1.50 ± 0.71', '+0.5')
    """
    written = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    if len(values) > 1:
        written += f" ± {statistics.stdev(values):.{digits}f}"
    return written


def text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table; the first column to the left, others to the right.

    Example:
        >>> print(text(("block", "share"), [("a", "10%"), ("bb", "5%")]))
        block  share
        a        10%
        bb        5%
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(
                zip(line, widths, strict=True)
            )
        ).rstrip()
        for line in lines
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown(("a", "b"), [("1", "2")]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    joined = ["| " + " | ".join(line) + " |" for line in lines]
    joined[1] = joined[1].replace(" ", "")
    return "\n".join(joined)


def count(number: float) -> str:
    """A number of things, short: `960_041_728` is `"960M"`.

    Example:
        >>> count(85_798_656), count(999), count(2.0e9)
        ('85.8M', '999', '2B')
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """A number of bytes, short.

    Example:
        >>> size(3_840_166_912), size(512)
        ('3.58 GiB', '512 B')
    """
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f} B"
