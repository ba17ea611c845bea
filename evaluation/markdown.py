"""The tables of all reports."""


def markdown_table(heads: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Return a Markdown table; columns after the first `text_columns` are numbers, aligned right."""
    rules = ["---"] * text_columns + ["---:"] * (len(heads) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rules, *rows])
