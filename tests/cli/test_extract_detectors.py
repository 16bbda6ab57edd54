"""`uniter-extract --list-detectors` and `--fetch NAME`: what is known of each detector, and its weights beforehand."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from uniter.cli.extract import main
from uniter.extract.known_detectors import known_detectors
from uniter.extract.weights.fetching import fetched_path

PAGE = Path(__file__).parents[2] / "docs" / "extraction.md"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def test_every_detector_is_listed_with_what_is_known_of_it() -> None:
    listed = {one["name"]: one for one in json.loads(run("--list-detectors", "--json").stdout)}
    assert {"butd", "butd-36", "vinvl", "on-board", "COCO-Detection/faster_rcnn_R_101_C4_3x"} <= listed.keys()
    assert listed["vinvl"]["classes"] == 1594 and listed["vinvl"]["attributes"] == 524 and listed["vinvl"]["width"] == 2048
    assert listed["on-board"]["here"] and not listed["butd"]["here"]
    assert listed["COCO-Detection/faster_rcnn_R_50_FPN_3x"]["width"] == 1024
    assert all(one["licence"] for one in listed.values())
    assert all(source.startswith(("https://", "/", "unc-nlp/")) for one in listed.values() for source in one["sources"])


def test_what_is_on_this_machine_is_said() -> None:
    source = next(one for one in known_detectors() if one.name == "vinvl").sources[1]
    fetched_path(source).parent.mkdir(parents=True)
    fetched_path(source).touch()
    lines = run("--list-detectors").stdout.splitlines()
    assert lines[lines.index("vinvl: 1,594 classes, 524 attributes, 2,048 features, weights MIT") + 1] == "    on this machine"
    assert "    not here: uniter-extract --fetch butd" in lines


def test_the_page_shows_what_is_printed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for known in known_detectors():
        if known.name in ("butd", "vinvl", "on-board"):
            assert known.lines()[0] in page


def test_weights_are_fetched_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("--fetch", "on-board", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["layout"] == "detectron2"
    monkeypatch.setattr("uniter.extract.weights.load.silent_sources", lambda sources: {})
    monkeypatch.setattr("uniter.extract.weights.sources.fetch", lambda url: (_ for _ in ()).throw(OSError("no network")))
    failed = run("--fetch", "nonsense")
    assert failed.exit_code == 2 and "unknown detector 'nonsense'" in failed.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--fetch", "butd", "--attributes"], "--list-detectors and --fetch NAME stand alone; leave the others out (attributes)"),
        (["--list-detectors", "photos"], "leave the others out (images)"),
        (["--list-detectors", "--fetch", "butd"], "leave the others out (list_detectors)"),
        ([], "Missing argument 'IMAGES'"),
        (["photos"], "Missing argument 'OUT'"),
    ],
)
def test_nothing_stands_beside_them(words: list[str], sentence: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and sentence in result.stderr
