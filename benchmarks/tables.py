"""Markdown of what was measured, and its place in a document, between two marks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TITLES = {"redis": "Redis", "amqp": "RabbitMQ"}


def to_number(value: float | None) -> str:
    """Three digits or more; nothing where nothing was measured."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 1 or not value else f"{value:.2f}"


def to_table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], names: Sequence[str] = ("peer",)) -> str:
    """Make a table whose first columns are names, and the others numbers."""
    lines = [
        f"| {' | '.join([*[''] * len(names), *columns.values()])} |",
        "|---" * len(names) + "|---:" * len(columns) + "|",
    ]
    for row in rows:
        cells = [*(str(row[name]) for name in names), *(to_number(row.get(column)) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_into(document: Path, command: str, block: str) -> None:
    """Replace what lies between the two marks of a command in a document."""
    begin_mark, end_mark = f"<!-- {command}: begin -->", f"<!-- {command}: end -->"
    before, begin, rest = document.read_text(encoding="utf-8").partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not end:
        message = f"{document} has no {begin_mark} ... {end_mark}"
        raise ValueError(message)
    document.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}", encoding="utf-8")
