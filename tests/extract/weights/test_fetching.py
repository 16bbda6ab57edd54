"""Fetching over https, against a server of this machine that breaks off, changes its files, or leads elsewhere."""

import hashlib
import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.weights.fetching import discard, fetch, fetched_path

CONTENT = bytes(range(256)) * 9000


class Server:
    """What the tests' server does: its content, how it ends, whom it asks to go elsewhere.

    Attributes:
        breaks_after: bytes of an answer after which the connection ends; None for all.
        ranges: whether parts are sent.
        seen: the Range header of each request.
    """

    def __init__(self) -> None:
        self.content, self.tag = CONTENT, '"one"'
        self.breaks_after: int | None = None
        self.ranges, self.elsewhere = True, ""
        self.seen: list[str | None] = []
        self.address = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.seen.append(asked)
        if self.elsewhere:
            request.send_response(302)
            request.send_header("Location", self.elsewhere)
            request.end_headers()
            return
        begin = 0
        if asked and self.ranges and request.headers.get("If-Range") == self.tag:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(self.content):
                request.send_error(416)
                return
        part = self.content[begin:]
        request.send_response(206 if begin else 200)
        if begin:
            request.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        request.send_header("Content-Length", str(len(part)))
        request.send_header("ETag", self.tag)
        request.end_headers()
        request.wfile.write(part[: self.breaks_after])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    made = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.answer(self)

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setattr("uniter.extract.weights.fetching._PLAIN_HOSTS", frozenset(["127.0.0.1"]))
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        made.address = f"http://127.0.0.1:{serving.server_address[1]}/w.pth"
        yield made
        serving.shutdown()


def leftovers(url: str) -> list[str]:
    target = fetched_path(url)
    return sorted(path.name.replace(target.name, "") for path in target.parent.iterdir())


def test_a_file_is_fetched_once_and_remembered(server: Server) -> None:
    path = fetch(server.address)
    assert path.read_bytes() == CONTENT and fetch(server.address) == path and len(server.seen) == 1
    remembered = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert remembered["sha256"] == hashlib.sha256(CONTENT).hexdigest() and remembered["bytes"] == len(CONTENT)
    assert leftovers(server.address) == ["", ".json"]


def test_what_was_begun_is_continued_by_the_same_command(server: Server) -> None:
    server.breaks_after = 0
    with pytest.raises(UniterError, match=r"the download ended after 0 of 2,304,000 bytes; the same command goes on from there"):
        fetch(server.address)
    server.breaks_after = 700_000
    with pytest.raises(UniterError, match=r"ended after 2,100,000 of 2,304,000 bytes"):  # three connections, each with a part
        fetch(server.address)
    assert server.seen[-2:] == ["bytes=700000-", "bytes=1400000-"]
    server.breaks_after = None
    assert fetch(server.address).read_bytes() == CONTENT and server.seen[-1] == "bytes=2100000-"
    assert leftovers(server.address) == ["", ".json"]


@pytest.mark.parametrize("change", ["another version", "no ranges", "a shorter file of the same tag"])
def test_what_cannot_be_continued_is_begun_anew(server: Server, change: str) -> None:
    server.breaks_after = 600_000
    with pytest.raises(UniterError):
        fetch(server.address)
    server.breaks_after = None
    if change == "another version":
        server.content, server.tag = CONTENT[::-1], '"two"'
    elif change == "no ranges":
        server.ranges = False
    else:
        server.content = CONTENT[:1000]
    assert fetch(server.address).read_bytes() == server.content


def test_a_file_that_changed_is_said(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    path = fetch(server.address)
    path.unlink()
    assert fetch(server.address).read_bytes() == CONTENT and "CHANGED" not in caplog.text
    path.unlink()
    server.content = b"something else"
    fetch(server.address)
    assert "the file has CHANGED" in caplog.text and hashlib.sha256(CONTENT).hexdigest() in caplog.text
    # It turns out to be no weights: what was known before is known again.
    discard(path)
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_a_sha256_that_is_known_is_asked_for(server: Server) -> None:
    good, bad = hashlib.sha256(CONTENT).hexdigest(), "0" * 64
    with pytest.raises(BadInput, match=f"its SHA-256 is {good}, not {bad} as was asked for; the file is not kept"):
        fetch(f"{server.address}#sha256={bad}")
    assert not fetched_path(server.address).exists()
    assert fetch(f"{server.address}#sha256={good.upper()}") == fetched_path(server.address)
    with pytest.raises(BadInput, match="expected nothing behind the #, or sha256= and 64 hexadecimal digits"):
        fetch(f"{server.address}#md5=1")


@pytest.mark.parametrize("elsewhere", ["http://example.org/w.pth", "ftp://127.0.0.1/w.pth", "file:///etc/passwd"])
def test_nothing_is_fetched_unprotected(server: Server, elsewhere: str) -> None:
    with pytest.raises(UniterError, match=r"http://example\.org/w\.pth: not an https address"):
        fetch("http://example.org/w.pth")
    server.elsewhere = elsewhere
    with pytest.raises(UniterError, match=r"not an https address|Redirection to url .* is not allowed"):
        fetch(server.address)
    assert not fetched_path(server.address).exists()


def test_of_many_that_want_a_file_one_fetches(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    script = """if True:
        import sys, uniter.extract.weights.fetching as fetching
        fetching._PLAIN_HOSTS = frozenset(["127.0.0.1"])
        print(len(fetching.fetch(sys.argv[1]).read_bytes()))
        """
    running = [
        subprocess.Popen([sys.executable, "-c", script, server.address], stdout=subprocess.PIPE, env=dict(os.environ)) for _ in range(3)
    ]
    threads = [threading.Thread(target=fetch, args=(server.address,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and int(out) == len(CONTENT)
    assert len(server.seen) == 1 and fetch(server.address).read_bytes() == CONTENT
    assert leftovers(server.address) == ["", ".json"]


def test_the_hubs_own_sha256_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from uniter.extract.weights.sources import find_weight_file

    digest = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / digest).write_bytes(CONTENT)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / digest)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(tmp_path / "model.safetensors"))
    monkeypatch.chdir(tmp_path)
    assert find_weight_file("somebody/detector").read_bytes() == CONTENT
    (tmp_path / digest).write_bytes(CONTENT[:-1])
    with pytest.raises(BadInput, match=f"not the published {digest}; delete it"):
        find_weight_file("somebody/detector")
