"""Claims of m2ae.viz.report."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from m2ae.viz.report import Table, write_report
from m2ae.viz.similarity import similarity_matrix

NASTY = '<script>alert("1")</script> & \'x\' <img src="https://example.com/a.png">'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    """A PNG file."""
    path = tmp_path / "figures" / "similarity.png"
    similarity_matrix(torch.eye(3), path, title="")
    return path


def test_everything_given_is_on_the_page_as_text(tmp_path: Path, figure: Path) -> None:
    path = write_report(
        tmp_path,
        title=f"title {NASTY}",
        facts={"seed": "0", f"fact {NASTY}": f"value {NASTY}"},
        tables=[
            Table(f"table {NASTY}", ["", f"column {NASTY}"], [["model", f"cell {NASTY}"]]),
            Table("second", ["a"], [], note=f"note {NASTY}"),
        ],
        figures=[(figure, f"caption {NASTY}")],
    )
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts["title"] == page.texts["h1"] == [f"title {NASTY}"]
    assert page.texts["dt"] == ["seed", f"fact {NASTY}"]
    assert page.texts["dd"] == ["0", f"value {NASTY}"]
    assert page.texts["h2"] == [f"table {NASTY}", "second"]
    assert page.texts["th"] == [f"column {NASTY}", "a"]
    assert page.texts["td"] == ["model", f"cell {NASTY}"]
    assert page.texts["p"] == [f"note {NASTY}"]
    assert page.texts["figcaption"] == [f"caption {NASTY}"]
    (image,) = page.attributes("img")
    assert image["alt"] == f"caption {NASTY}"


def test_the_page_needs_nothing_else(tmp_path: Path, figure: Path) -> None:
    path = write_report(tmp_path, title="t", facts={}, tables=[], figures=[(figure, "c")])
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    source = page.attributes("img")[0]["src"]
    assert source is not None
    kind, data = source.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == figure.read_bytes()
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in html
    policy = [tag["content"] for tag in page.attributes("meta") if "http-equiv" in tag]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in html


def test_figures_are_looked_for_in_the_folder(tmp_path: Path, figure: Path) -> None:
    name = figure.relative_to(tmp_path)
    path = write_report(tmp_path, title="t", facts={}, tables=[], figures=[(name, ""), (name, "")])
    assert len(Page(path.read_text()).attributes("img")) == 2


def test_columns_of_numbers_are_aligned(tmp_path: Path) -> None:
    rows = [["model", "19.7 ± 2.0", "1 of 2", ""], ["chance", "< 0.2", "none", "-3"]]
    table = Table("t", ["", "R@1", "text", "rank"], rows)
    path = write_report(tmp_path, title="t", facts={}, tables=[table], figures=[])
    page = Page(path.read_text())
    for tag, lines in (("th", 1), ("td", 2)):
        aligned = [cell.get("class") for cell in page.attributes(tag)]
        assert aligned == [None, "number", None, "number"] * lines


def test_wrong_figures_leave_the_old_report(tmp_path: Path) -> None:
    old = tmp_path / "report.html"
    old.write_text("old")
    (tmp_path / "a.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"figures that are PNG files, got 'a\.svg'"):
        write_report(tmp_path, title="t", facts={}, tables=[], figures=[("a.svg", "")])
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, title="t", facts={}, tables=[], figures=[("none.png", "")])
    assert old.read_text() == "old"


def test_rows_have_a_cell_for_each_column() -> None:
    with pytest.raises(
        ValueError, match="Table 't': expected 2 cells in every row, got 1 in row 1"
    ):
        Table("t", ["a", "b"], [["1", "2"], ["1"]])
