"""Whether there is a network is asked once, quickly, and never where a proxy stands between."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from uniter.cli.train import main as train
from uniter.datasets import network
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.model.checkpoints.read import find_weights


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    network.reachable.cache_clear()
    yield
    network.reachable.cache_clear()


def test_a_host_that_listens_is_reachable_and_one_that_does_not_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert network.reachable(address + "/some/file")
    network.reachable.cache_clear()
    assert not network.reachable(address)
    assert not network.reachable("https://no-such-host.invalid/x")


def test_behind_a_proxy_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert network.reachable("https://no-such-host.invalid")


def test_without_network_every_name_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for ask in (find_weights, Tokenizer.load):
        ask_twice = [0.0, 0.0]
        for number in range(2):  # the first one also imports the hub's library
            begun = time.monotonic()
            with pytest.raises(BadInput, match="no network, and it is not in the cache"):
                ask("nobody/nothing")  # type: ignore[operator]
            ask_twice[number] = time.monotonic() - begun
        assert ask_twice[1] < 3


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["predict", "mach"], "did you mean 'match'?", 2),
        (["predict", "match", "--from", "run", "--image", "nowhere.jpg", "--text", "a"], "nowhere.jpg: No such file or folder", 1),
        (["predict", "match", "--from", "run", "--image", ".", "--text", "a", "--out", "page.docx"], "page.docx", 2),
    ],
)
def test_what_is_written_wrong_is_said_before_anything_is_loaded(
    words: list[str], message: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"")
    monkeypatch.setattr("uniter.extract.install.require_detectron2", lambda: pytest.fail("was asked for first"))
    result = CliRunner().invoke(train, words)
    assert result.exit_code == code and message in result.output
