"""Groups of a LLaVA JSON file's rows by what they say of themselves, such as how high their glyphs are."""

from bisect import bisect
from itertools import islice
from pathlib import Path
from typing import Any

from lightvlm.data.llava import read_rows


def group_rows(data_path: str | Path, groupings: list[str], limit: int | None = None) -> dict[str, list[int]]:
    """Return row numbers by group: "kind sign", or of numbers "glyph_height [15, 20)", in the order of their values.

    Args:
        data_path: of `load_llava`.
        groupings: fields of the rows; behind a colon the numbers where new groups begin, "glyph_height:15,20,30";
            several joined by + make a group of each combination, "kind+glyph_height:20".
        limit: how many rows count, from the first.

    Raises:
        ValueError: if a row lacks a field, or has no number where there are limits between groups.
    """
    rows, groups = [*islice(read_rows(data_path), limit)], {}
    for grouping in groupings:
        parts = [name_values(rows, *read_grouping(part), data_path) for part in grouping.split("+")]
        found = [*zip(*parts, strict=True)]
        for key in sorted({*found}):
            name = ", ".join(name for *_, name in key)
            groups[name] = [number for number, other in enumerate(found) if other == key]
    return groups


def name_values(rows: list[dict], field: str, edges: list[float], data_path: str | Path) -> list[tuple]:
    """Return of each row what its group is sorted by, and called."""
    values = [read_field(row, number, field, edges, data_path) for number, row in enumerate(rows)]
    if edges:
        names = name_bins(edges)
        return [(0, bisect(edges, value), "", f"{field} {names[bisect(edges, value)]}") for value in values]
    return [
        (1, 0, value, f"{field} {value}") if isinstance(value, str) else (0, value, "", f"{field} {value}")
        for value in values
    ]


def read_grouping(text: str) -> tuple[str, list[float]]:
    """Return the field, and where groups begin, if that is given; ValueError if these are no rising numbers."""
    field, _, numbers = text.partition(":")
    try:
        edges = [float(number) for number in numbers.split(",") if numbers]
    except ValueError:
        edges = [0, 0]
    if edges != sorted({*edges}):
        raise ValueError(f"--group-by must be FIELD or FIELD:15,20,30 with rising numbers, got {text!r}")
    return field, edges


def read_field(row: dict, number: int, field: str, edges: list[float], data_path: str | Path) -> Any:
    """Return a row's field; ValueError if it is not there, is no number and should be, or is neither that nor text."""
    if field not in row:
        raise ValueError(f"{data_path}: row {number} has no {field}: group by one of {', '.join(row)}")
    kinds, wanted = (int | float, "a number") if edges else (int | float | str, "a number or text")
    if not isinstance(row[field], kinds):
        raise ValueError(f"{data_path}: {field} of row {number} must be {wanted}, got {row[field]!r:.40}")
    return row[field]


def name_bins(edges: list[float]) -> list[str]:
    """Return the names of the groups between these numbers."""
    between = [f"[{low:g}, {high:g})" for low, high in zip(edges, edges[1:], strict=False)]
    return [f"< {edges[0]:g}", *between, f"≥ {edges[-1]:g}"] if edges else []
