"""What came out of a run, as one page that can be mailed."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2ae.atomic_files import write_files

FILE = "report.html"
NUMBER = re.compile(r"[-+±<>≤≥≈]?\s?\d")  # how a cell that holds a number begins

# No script, and nothing is loaded, even if a caption says so.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --ink: #1d2125; --faint: #626a73; --line: #d9dde2;
}
@media (prefers-color-scheme: dark) {
  :root { --ground: #16191d; --ink: #e4e7ea; --faint: #9aa3ad; --line: #363c44; }
}
body {
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  font: 16px/1.5 system-ui, sans-serif;
  background: var(--ground); color: var(--ink);
}
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; margin: 0; }
dt, figcaption, .note { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; }
th { font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
.note { margin: .4rem 0; font-size: .9rem; }
figure { margin: 2rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { margin-top: .4rem; font-size: .9rem; }
"""


@dataclass(frozen=True)
class Table:
    """A table of a report, all cells as they are to be read.

    Attributes:
        title: above it.
        columns: their names.
        rows: a cell for each column.
        note: below it: what the numbers are, which protocol; "" for none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Table {self.title!r}: expected {len(self.columns)} cells in every row, "
                    f"got {len(row)} in row {i}"
                )


def write_report(
    folder: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    tables: Sequence[Table],
    figures: Sequence[tuple[str | Path, str]],
) -> Path:
    """Write report.html: facts, tables and figures on a page that needs no other file.

    It has no script and loads nothing; images are part of it; it follows the reader's choice of
    light or dark. All texts are shown as they are: markup in them is not interpreted.

    Args:
        folder: where to; made if it does not exist.
        title: of the page.
        facts: name to value, such as data set, seed, time.
        tables: in this order. A column of numbers is aligned at its right.
        figures: PNG files, paths absolute or from `folder`, with what is said below them.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: a figure is not there.
        ValueError: a figure is not a PNG file.
        OSError: the file cannot be written.
    """
    folder = Path(folder)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{html.escape(title)}</h1>",
        "<dl>",
        *(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()),
        "</dl>",
        *(_table(table) for table in tables),
        *(_figure(folder / file, caption) for file, caption in figures),
        "</body>",
        "</html>",
        "",
    ]
    page = "\n".join(parts)
    write_files(folder, {FILE: lambda path: _write_text(path, page)})
    return folder / FILE


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _table(table: Table) -> str:
    is_number = [
        any(row[i] for row in table.rows)
        and all(not row[i] or NUMBER.match(row[i]) for row in table.rows)
        for i in range(len(table.columns))
    ]

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = (' class="number"' if number else "" for number in is_number)
        inside = (
            f"<{tag}{mark}>{html.escape(cell)}</{tag}>"
            for mark, cell in zip(marks, cells, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    parts = [
        f"<h2>{html.escape(table.title)}</h2>",
        '<div class="wide"><table>',
        f"<thead>{line('th', table.columns)}</thead>",
        "<tbody>",
        *(line("td", row) for row in table.rows),
        "</tbody>",
        "</table></div>",
    ]
    if table.note:
        parts.append(f'<p class="note">{html.escape(table.note)}</p>')
    return "\n".join(parts)


def _figure(file: Path, caption: str) -> str:
    data = file.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"write_report: expected figures that are PNG files, got {file.name!r}")
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    text = html.escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'
