"""The table of what a connector finds, beside what it has to be read against."""

from typing import Any

COLUMNS = {  # head of a column, in two lines, to the method in metrics.json
    "prediction\nhead": "prediction",
    "contrast\nhead": "contrastive",
    "ridge": "ridge",
    "ridge,\nshuffled": "ridge_shuffled_in_category",
    "chance": "chance",
}
NOTE = (
    "Recall in percent among {n} held-out items, by the connector's two heads. Ridge: closed-form"
    " linear regression, its penalty chosen on validation items; shuffled: fitted to pairs that are"
    " shuffled inside their category, so it has learned from categories and not from items."
)


def show_retrieval(figures: dict[str, Any]) -> None:
    """Print the table on the terminal, in 80 columns.

    Args:
        figures: of metrics.json; without "retrieval", there is no table but its other facts.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    retrieval = figures.get("retrieval", {})
    if retrieval:
        table = Table(title="Retrieval among held-out items", title_justify="left")
        table.add_column("direction", no_wrap=True)
        table.add_column("recall", no_wrap=True)
        for head in COLUMNS:
            table.add_column(head, justify="right", no_wrap=True)
        for direction, row in table_rows(retrieval):
            table.add_row(*row, end_section=direction)
        console.print(table)
        protocol = next(iter(retrieval.values()))["protocol"]  # "1:1, 449 queries, 449 keys"
        console.print(NOTE.format(n=protocol.split(", ")[1].split()[0]), highlight=False)
    if figures.get("features"):
        console.print(f"Features: {figures['features']}.", highlight=False)
    steps = ", ".join(f"{n} {direction}" for direction, n in figures["steps"].items())
    console.print(
        f"{figures['parameters']:,} parameters; steps: {steps};"
        f" {figures['samples_per_second']:,.0f} samples per second; seed {figures['seed']}",
        highlight=False,
    )


def table_rows(retrieval: dict[str, Any]) -> list[tuple[bool, list[str]]]:
    """Rows of the table, and whether each is the last of its direction.

    Args:
        retrieval: direction to method to recall, as in metrics.json.

    Returns:
        A row for R@1 and one for R@10 of each direction; "-" for what could not be computed.
    """
    rows = []
    for direction, methods in retrieval.items():
        for name in ("R@1", "R@10"):
            cells = [_percent(methods.get(method), name) for method in COLUMNS.values()]
            rows.append((name == "R@10", [direction if name == "R@1" else "", name, *cells]))
    return rows


def _percent(method: dict[str, Any] | None, name: str) -> str:
    if method is None:
        return "-"
    recall = method[name]
    return f"{recall['percent'] if isinstance(recall, dict) else recall:.1f}"
