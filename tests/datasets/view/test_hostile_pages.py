"""Nothing that other people's files say becomes markup of a page: no element, no attribute, and a policy under which no script runs.

Every place of a page that shows a word of somebody else's is given each of these words. What the parser of a browser would make of the
page is compared with what the page itself is made of; what would run as a script in a browser without the policy needs a name of an
attribute (`onerror`) or an element that is not among them.
"""

import html.parser
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from uniter.cli.view import main
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.runs.held_out import ClassFigures, FoundBox, HeldOut, HeldOutPicture
from uniter.datasets.view.charts import curves, histogram
from uniter.datasets.view.class_report import write_class_report
from uniter.datasets.view.outcomes import HardExample, Outcomes
from uniter.datasets.view.region_report import write_region_report
from uniter.datasets.view.run_report import LookedAt, write_runs_report

HOSTILE = (
    '" onerror="document.title=1',
    "' onerror='document.title=1",
    '"><img src=x onerror=document.title=1>',
    "<script>document.title=1</script>",
    "</text></svg><i onclick=document.title=1>&amp;",
)
EACH_WORD = pytest.mark.parametrize("word", HOSTILE, ids=["quote", "single quote", "tag in attribute", "script", "end of chart"])

ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "a", "ul", "li", "nav", "div", "span",
    "details", "summary", "figure", "figcaption", "img", "table", "thead", "tbody", "tr", "th", "td", "svg", "g", "rect", "line",
    "path", "text",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "content", "http-equiv", "class", "style", "href", "src", "alt", "loading", "width", "height",
    "viewbox", "role", "aria-label", "x", "y", "x1", "x2", "y1", "y2", "d", "fill", "stroke", "stroke-width", "stroke-linecap",
    "opacity", "text-anchor",
}  # fmt: skip


class Parsed(html.parser.HTMLParser):
    """What a page is made of: its elements with their attributes in order, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> comes twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def parsed(page: str) -> Parsed:
    """The page, made of nothing but what pages are made of."""
    found = Parsed(page)
    assert {tag for tag, _ in found.elements} <= ELEMENTS
    assert {name for _, attributes in found.elements for name in attributes} <= ATTRIBUTES
    return found


def same_skeleton(hostile: Parsed, harmless: Parsed) -> None:
    """Hostile words change what stands in a page, not its elements and the names of their attributes."""
    assert [(tag, list(attributes)) for tag, attributes in hostile.elements] == [
        (tag, list(attributes)) for tag, attributes in harmless.elements
    ]


def policy_of(page: str) -> dict[str, list[str]]:
    """The page's Content-Security-Policy, which must stand before all that it is to hold for."""
    (content,) = (
        attributes["content"] for _, attributes in parsed(page).elements if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    head = page[: page.index("Content-Security-Policy")]
    assert {tag for tag, _ in Parsed(head).elements} <= {"html", "head", "meta"} and len(head) < 300
    directives = [directive.split() for directive in content.split(";")]
    assert len({name for name, *_ in directives}) == len(directives), "of a directive that comes twice the first one holds"
    return {name: values for name, *values in directives}


def forbids_scripts(page: str) -> None:
    policy = policy_of(page)
    assert {name: policy.get(name) for name in ("script-src", "object-src", "base-uri")} == {
        "script-src": ["'none'"],
        "object-src": ["'none'"],
        "base-uri": ["'none'"],
    }


def record() -> RegionFeatures:
    boxes = np.array([[5, 5, 60, 40], [20, 10, 90, 55]], np.float32)
    return RegionFeatures(
        features=np.ones((2, 8), np.float32),
        norm_bb=normalised_boxes(boxes, (60, 100)),
        conf=np.array([0.9, 0.4], np.float32),
        boxes=boxes,
        size=(60, 100),
        soft_labels=np.array([[0.1, 0.9, 0.0], [0.3, 0.3, 0.4]], np.float32),
        attributes=np.array([[0.1, 0.9], [0.9, 0.1]], np.float32),
    )


def database(folder: Path, word: str) -> Path:
    """A database that says the word wherever a database says anything, its own name apart, which is no place for a slash."""
    out = folder / f"{word.replace('/', '')}.lmdb"
    store = UnitStore(out, settings={})
    with store.unit(0) as writer:
        assert writer is not None
        writer.put(word, encode_record(record()), regions=2)
        writer.fail(f"failed {word}", f"photos/{word}", f"no image: {word}")
        writer.complete()
    header = {
        "feature_width": 8,
        "label_classes": 3,
        "class_names": [f"class {word}", f"other {word}"],
        "attribute_names": [f"attribute {word}"],
        "detector": f"detector {word}",
        "weights": {word: f"weights {word}"},
        "selection": [word],
        "class_names_from": word,
    }
    assert store.finish(units=1, header=header)
    return out


def region_page(folder: Path, word: str) -> str:
    photo = folder / "photos" / f"{word}.png"  # a word with "/" in it is a path below the folder
    photo.parent.mkdir(parents=True)
    Image.new("RGB", (30, 90)).save(photo)  # of another shape than the regions' image
    out = folder / "report"
    write_region_report([database(folder, word)], out, photographs=folder / "photos", captions=lambda key: [f"caption {word}"])
    return (out / "index.html").read_text()


@EACH_WORD
def test_a_page_of_regions(tmp_path: Path, word: str) -> None:
    page = region_page(tmp_path / "hostile", word)
    found = parsed(page)
    same_skeleton(found, parsed(region_page(tmp_path / "harmless", "harmless")))
    assert [value for value in found.values("alt") if value] == [f"regions of {word}"], "the whole key, and not more"
    for said in (f"class {word}", f"attribute {word}", f"detector {word}", f"caption {word}", f"failed {word}", f"no image: {word}"):
        assert said in found.text
    assert f"the photograph {word.split('/')[-1]}.png is 30 × 90" in found.text
    assert f"photos/{word}" in found.text and f"{word.replace('/', '')}.lmdb" in found.text
    for place in (*found.values("src"), *found.values("href")):
        assert place.startswith("pictures/") and set(place) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/")
    forbids_scripts(page)


def class_page(folder: Path, word: str) -> str:
    folder.mkdir()
    write_class_report([database(folder, word)], folder / "report", f"class {word}")
    return (folder / "report" / "index.html").read_text()


@EACH_WORD
def test_a_page_of_one_class(tmp_path: Path, word: str) -> None:
    page = class_page(tmp_path / "hostile", word)
    found = parsed(page)
    same_skeleton(found, parsed(class_page(tmp_path / "harmless", "harmless")))
    assert [value for value in found.values("alt") if value] == [f"attribute {word} class {word} in {word}"]
    assert f"regions of class {word}" in found.text
    forbids_scripts(page)


def test_several_pages_have_the_policy_each(tmp_path: Path) -> None:
    out = tmp_path / "many.lmdb"
    store = UnitStore(out, settings={})
    with store.unit(0) as writer:
        assert writer is not None
        for number in range(101):
            writer.put(f"{number:03d}", encode_record(record()), regions=2)
        writer.complete()
    assert store.finish(units=1, header={"feature_width": 8, "label_classes": 3})
    write_region_report([out], tmp_path / "report", limit=0, most_boxes=1)
    for name in ("index.html", "page-2.html"):
        forbids_scripts((tmp_path / "report" / name).read_text())


def runs_page(out: Path, word: str) -> str:
    lines = [
        {"step": step, "kind": f"train{word}".replace(" ", "\t"), f"loss {word}": 1 / step, "nested": {word: step}} for step in (1, 2, 3)
    ]
    maps = {f"attention {word}": np.array([[0.7, 0.3], [0.2, 0.8]])}
    looks = [LookedAt(f"title {word}", f"key {word}", [f"word {word}", "other"], record(), maps, f"note {word}")]
    annotated = [FoundBox((1, 1, 9, 9), f"thing {word}")]
    worst = HeldOutPicture(f"file {word}.jpg", (20, 30), 1, 0, annotated, [])
    held_out = {f"run {word}": HeldOut(3, 1, 0.2, [ClassFigures(f"thing {word}", 1, 0.5, 0.5)], [worst])}
    runs = {f"run {word}": lines, "second": lines}
    write_runs_report(runs, out, looks=looks, held_out=held_out, class_names=[f"class {word}", "other"])
    return (out / "index.html").read_text()


@EACH_WORD
def test_a_page_of_runs_and_what_their_words_look_at(tmp_path: Path, word: str) -> None:
    page = runs_page(tmp_path / "hostile", word)
    found = parsed(page)
    same_skeleton(found, parsed(runs_page(tmp_path / "harmless", "harmless")))
    for said in (
        f"thing {word}",
        f"file {word}.jpg",
        f"run {word}",
        f"title {word}",
        f"word {word}",
        f"note {word}",
        f"attention {word}",
        f"loss {word}",
        f"nested.{word}",
    ):
        assert said in found.text
    assert sum(label.endswith(f" loss {word}") for label in found.values("aria-label")) == 1
    assert sum(label.endswith(f" nested.{word}") for label in found.values("aria-label")) == 1
    forbids_scripts(page)


def outcomes_page(out: Path, word: str) -> str:
    shown = HardExample(f"title {word}", f"text {word}", f"said {word}", f"truth {word}", f"note {word}", [f"key {word}"], [record()])
    pairs = {(f"truth {word}", f"said {word}"): 3, (f"truth {word}", f"truth {word}"): 2}
    outcomes = Outcomes(f"part {word}", {f"fact {word}": f"value {word}"}, pairs, [(0.4, 0.5, 2)], [shown])
    write_runs_report({"run": [{"step": 1, "kind": "train", "loss": 1.0}]}, out, outcomes=outcomes, class_names=[f"class {word}", "other"])
    return (out / "index.html").read_text()


@EACH_WORD
def test_a_page_of_what_was_right_and_wrong(tmp_path: Path, word: str) -> None:
    page = outcomes_page(tmp_path / "hostile", word)
    found = parsed(page)
    same_skeleton(found, parsed(outcomes_page(tmp_path / "harmless", "harmless")))
    for said in ("part", "fact", "value", "title", "text", "said", "truth", "note", "key"):
        assert f"{said} {word}" in found.text
    forbids_scripts(page)


def charts(word: str) -> Sequence[str]:
    points = ([1.0, 2.0], [3.0, 1.0])
    return (
        histogram(np.array([0.1, 0.9]), title=f"title {word}", axis=f"axis {word}", low=0, high=1, bins=2),
        curves({word: points}, colours={word: "#000"}, title=f"title {word}", axis=f"axis {word}"),
        curves({word: ([1.0], [float("nan")])}, colours={word: "#000"}, title=f"title {word}", axis=f"axis {word}"),
    )


@EACH_WORD
def test_words_in_charts(word: str) -> None:
    for chart, harmless in zip(charts(word), charts("harmless"), strict=True):
        found = Parsed(chart)
        same_skeleton(found, Parsed(harmless))
        assert found.values("aria-label") == [f"title {word}"]
        assert f"title {word}" in found.text and f"axis {word}" in found.text


@EACH_WORD
def test_by_the_command(tmp_path: Path, word: str) -> None:
    """From files to the page, without a name of this project's between them."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "kind": "train", word: 0.5}) + "\n")
    for number, source in enumerate((run, database(tmp_path, word))):
        result = CliRunner().invoke(main, [str(source), "--out", str(tmp_path / f"report{number}")])
        assert result.exit_code == 0, result.output
        page = (tmp_path / f"report{number}" / "index.html").read_text()
        assert word in parsed(page).text
        forbids_scripts(page)
