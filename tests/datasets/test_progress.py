"""What is said of how far a run is, on a terminal and elsewhere."""

import io
import time
from types import SimpleNamespace

import pytest

from uniter.datasets import progress
from uniter.datasets.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))  # pytest puts its own in sys between set-up and test
    return stream


def test_elsewhere_than_on_a_terminal_a_short_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, unit="images", label="extracting") as shown:
        shown.update(3)
    assert capsys.readouterr() == ("", "")


def test_elsewhere_a_long_run_says_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    with Progress(4, unit="pairs", label="scoring", brief=True) as shown:
        shown.update(2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("scoring: 2 of 4 pairs, ")


def test_what_was_found_does_not_count_into_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 10.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    shown = Progress(1200, unit="pairs", label="scoring")
    shown.found(1000)
    shown.done += 100
    assert shown.line() == "scoring: 1,100 of 1,200 pairs, 10 pairs/s, 10 s left"


def test_a_brief_step_that_is_over_at_once_shows_no_bar(terminal: Terminal) -> None:
    with Progress(10, unit="images", label="step", brief=True) as shown:
        shown.update(10)
    assert "step" not in terminal.getvalue()


def test_a_brief_step_that_takes_longer_shows_one_and_wipes_it_away(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BRIEF_AFTER_SECONDS", 0.01)
    with Progress(10, unit="images", label="step", brief=True) as shown:
        shown.found(2)
        time.sleep(0.3)
        shown.update(8)
        shown.update(0)
    lines = terminal.getvalue()
    assert "step" in lines and not lines.rstrip(" ").endswith("\n") and lines.rsplit("\r", 2)[-2].strip() == ""


def test_a_whole_run_leaves_its_bar_standing(terminal: Terminal) -> None:
    with Progress(10, unit="images", label="extracting", done=4) as shown:
        shown.update(6)
    assert "10/10" in terminal.getvalue().splitlines()[-1]
