"""Pages from templates, and the folder that a report is drawn into.

What a reader would get wrong: keys, class names, captions and messages come from other people's files, and are handed to the templates as
they are. The templates (`*.html` beside this file) escape all that they show; only what a template itself has made, a chart or a card, is
markup (`Markup`). Nobody writes a tag in Python.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.claims import SETTINGS, Maker, claim, refuse_source_inside
from uniter.datasets.storage.files import keep_others, read_json_object, write_json

INDEX: Final = "index.html"
PICTURES: Final = "pictures"
REPORT: Final = Maker("a report", complete=INDEX, writes=("page-*.html", PICTURES))
_MARK: Final = Markup('<meta name="generator" content="uniter-view">')
_PICTURE: Final = re.compile(
    r"(small-)?\d{6}-.*\.jpg|\d{3}(-\d+-\d{3})?\.jpg|held-out-\d+-\d{3}\.jpg"
)  # of regions; of what words look at; of trainings

_TEMPLATES: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.globals["mark"] = _MARK


def render(template: str, **values: Any) -> Markup:
    """What a template of this folder makes of the values: markup in which every text of theirs is escaped."""
    return Markup(_TEMPLATES.get_template(template).render(values))


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page as UTF-8. Lone halves of surrogate pairs (JSON and file names can hold them) become question marks."""
    path.write_bytes(render(template, **values).encode("utf-8", "replace"))


@contextmanager
def report_folder(out: Path, sources: Sequence[str | Path]) -> Iterator[Path]:
    """A folder to draw a report into, with `pictures/` in it; it takes the place of an earlier report when the block ends well.

    Args:
        out: the report's folder. Where the block fails, what was there stays as it was.
        sources: what the report is about.

    Raises:
        BadInput: `out` holds something that is no report, or one of the sources.
    """
    for source in sources:
        refuse_source_inside(out, Path(source))
    _refuse_what_is_no_report(out)
    # The time makes every report another one: what a killed command drew is never taken for a part of this one.
    claimed = claim(out, {"begun": datetime.now(UTC).isoformat()}, maker=REPORT, overwrite=True)
    with claimed.alone("drawing"):
        try:
            (claimed.folder / PICTURES).mkdir(exist_ok=True)
            yield claimed.folder
        except BaseException:
            claimed.abandon()
            raise
        if claimed.folder != out:
            keep_others(out / PICTURES, claimed.folder / PICTURES, ours=lambda name: _PICTURE.fullmatch(name) is not None)
        claimed.publish()


def _refuse_what_is_no_report(out: Path) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        return
    settings, index = out / SETTINGS, out / INDEX
    if settings.is_file():
        ours = read_json_object(settings).get("kind") == REPORT.kind
    else:
        ours = index.is_file() and _MARK in index.read_text(encoding="utf-8", errors="replace")[:1000]
    if not ours:
        raise BadInput(f"{out} holds files that are no report of uniter-view; choose another --out")
    if not settings.is_file():  # an older version's report
        write_json(settings, {"kind": REPORT.kind})
