"""report.html: one file that needs nothing else, neither other files nor a network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from newllm.report.collect import Unreadable
from newllm.report.tables import Table

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #1f2430; background: #fff; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; }
p.note { color: #6b7280; margin: 0 0 .6rem; max-width: 80ch; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right; white-space: nowrap; }
th { color: #6b7280; font-weight: 600; cursor: pointer; border-bottom: 2px solid #d1d5db; }
th.text, td.text { text-align: left; } td.long { white-space: normal; min-width: 30ch; }
tr:hover td { background: #f6f7f9; } img { max-width: 100%; min-width: 700px; height: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""
# A click on a head sorts by the first number of its cells, or by their text.
SCRIPT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], place = head.cellIndex, up = head.dataset.up !== "1";
  const key = (row) => { const told = row.cells[place].textContent.replaceAll(",", ""), found = parseFloat(told);
    return Number.isNaN(found) ? told : found; };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  head.dataset.up = up ? "1" : "0";
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b)) * (up ? 1 : -1)));
});
"""


def _table(table: Table) -> str:
    def cell(tag: str, place: int, content: str) -> str:
        kinds = [kind for kind, holds in (("text", place in table.texts), ("long", len(content) > 60)) if holds]
        return f'<{tag} class="{" ".join(kinds)}">{escape(content).replace("+-", "&plusmn;")}</{tag}>'

    head = "".join(cell("th", place, title) for place, title in enumerate(table.columns))
    rows = ("".join(cell("td", place, content) for place, content in enumerate(row)) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    note = f'<p class="note">{escape(table.note).replace("+-", "&plusmn;")}</p>' if table.note else ""
    return (
        f"<h2>{escape(table.title)}</h2>{note}\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _image(path: Path, description: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="scroll"><img alt="{escape(description)}" src="data:image/png;base64,{content}"></div>'


def page(
    title: str,
    summary: str,
    sections: Sequence[Table | tuple[str, Path]],
    curves: Sequence[tuple[str, Path]],
    unreadable: Sequence[Unreadable],
) -> str:
    """Return the report as HTML.

    Args:
        title: heading of the page.
        summary: one line under it.
        sections: tables, and headings with their PNG, in order; a table without rows is left out.
        curves: name and curves.png of single runs, folded away.
        unreadable: folders that could not be read.
    """
    parts = [f"<h1>{escape(title)}</h1>\n<p>{escape(summary)}</p>"]
    for section in sections:
        if not isinstance(section, Table):
            parts.append(f"<h2>{escape(section[0])}</h2>\n{_image(section[1], section[0])}")
        elif section.rows:
            parts.append(_table(section))
    if curves:
        parts.append("<h2>Curves of single runs</h2>")
    parts += [
        f"<details><summary>{escape(name)}</summary>{_image(path, f'curves of {name}')}</details>"
        for name, path in curves
    ]
    if unreadable:
        rows = [[str(item.folder), item.reason] for item in unreadable]
        parts.append(_table(Table("Not readable", ["folder", "reason"], rows, "", frozenset((0, 1)))))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        # An icon of no bytes: browsers would ask the server for one.
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
