"""One HTML page and its folder: nothing from outside, nothing unescaped."""

import html
import shutil
from collections.abc import Sequence
from pathlib import Path

from uniter.datasets.errors import BadInput

LISTED = 200  # rows of failures and missing photographs on the page


MARK = '<meta name="generator" content="uniter-view">'


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fbfbfa; --faint: #667085; --line: #d9dde3; --card: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #14181f; --faint: #98a2b3; --line: #333c49; --card: #1b212b; } }
body { margin: 0 auto; max-width: 1500px; padding: 1.5rem; font: 15px/1.45 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { margin: 0 0 .3rem; font-size: 1.6rem; }
h2 { margin: 2rem 0 .6rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: .95rem; overflow-wrap: anywhere; }
p, ul, ol { margin: .3rem 0; } ul { padding-left: 1.1rem; font-size: .93rem; } a { color: inherit; } .faint { color: var(--faint); }
.note { border-left: 4px solid #d97706; padding: .2rem .8rem; margin: .8rem 0; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(430px, 1fr)); gap: 1.2rem; align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; max-height: 460px; object-fit: contain; background: #8884; }
figcaption { padding: .6rem .9rem .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; } th { text-align: left; color: var(--faint); font-weight: 500; }
th, td { padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; vertical-align: -.05em; }
.words { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: .6rem; margin-bottom: 1rem; }
.words figcaption { padding: .2rem .6rem .3rem; font-weight: 600; } body > h3 { margin-top: 1.4rem; } body > h3 + p { font-size: 1.05rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1rem; } .facts { max-width: 60rem; }
svg.chart { width: 100%; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.bar { fill: #3b82f6; }
.grid { stroke: var(--line); } .tick { font-size: 11px; fill: var(--faint); }
.chart-title { font-size: 13px; font-weight: 600; fill: var(--ink); }
details > summary { cursor: pointer; color: var(--faint); margin-top: .3rem; } nav { margin: 1rem 0; } nav a, nav b { margin-right: .6rem; }
"""


def fresh_folder(folder: Path) -> Path:
    """The report's folder, emptied of an earlier report."""
    index = folder / "index.html"
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not index.is_file() or MARK not in index.read_text(encoding="utf-8", errors="replace")[:1000]:
            raise BadInput(f"{folder} holds files that are no report of uniter-view; choose another --out")
        shutil.rmtree(folder / "pictures", ignore_errors=True)
        for page in folder.glob("page-*.html"):
            page.unlink()
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    # Already marked: a report that was interrupted can be written again.
    index.write_text(f"<!doctype html>{MARK}<p>This report is not finished.</p>", encoding="utf-8")
    return folder


def listing(heading: str, keys: Sequence[str]) -> str:
    more = f", and {len(keys) - LISTED:,} more" if len(keys) > LISTED else ""
    return f'<p class="note"><b>{html.escape(heading)}:</b> {html.escape(", ".join(keys[:LISTED]))}{more}</p>'


def page_of(title: str, body: str) -> str:
    # Lone halves of surrogate pairs (JSON and file names can hold them) cannot be written as UTF-8.
    shown = html.escape(title)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{MARK}'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"script-src 'none'; object-src 'none'; base-uri 'none'\">"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{shown}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{shown}</h1>{body}</body></html>"
    )
    return page.encode("utf-8", "replace").decode("utf-8")
