"""`uniter-app`: the server as any client meets it, and the page in a real browser."""

import contextlib
import http.client
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from uniter.cli.app import main
from uniter.cli.web.application import PHOTOGRAPH_BYTES, Application
from uniter.cli.web.loading import load_application
from uniter.cli.web.photographs import Album, KeptRegions
from uniter.cli.web.serving import address_of, bound_socket, server_on, serves_this_machine_alone
from uniter.cli.web.turns import PLACES
from uniter.datasets.image_db.origin import RegionOrigin
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.text_db.vocabulary_files import SPECIALS
from uniter.model import UniterConfig, UniterForPretraining
from uniter.model.checkpoints.write import save_checkpoint
from uniter.model.heads.classification import UniterForClassification
from uniter.model.heads.downstream import UniterForVqa
from uniter.model.understanding import Understanding

WORDS = (*SPECIALS, "!", "a", "the", "red", "blue", "square", "what", "color", "?", "<", ">", "b")
HOSTILE = "\"><img src=x onerror='document.title=1'><b>.png"
CLASSES = ("quarter", "<b>bold</b>")
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def quarters(pixels: np.ndarray) -> RegionFeatures:
    """The four quarters of a picture; a feature is a quarter's mean colour, the second class has a hostile name."""
    height, width = pixels.shape[:2]
    corners = np.array([(x, y, x + 0.5, y + 0.5) for y in (0, 0.5) for x in (0, 0.5)], dtype=np.float32)
    places = (corners * [width, height, width, height]).astype(int)
    features = np.array([pixels[y0:y1, x0:x1].mean(axis=(0, 1)) / 255 for x0, y0, x1, y1 in places], dtype=np.float16)
    chances = np.array([[0.05, 0.9, 0.05], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [0.4, 0.6, 0.0]], dtype=np.float16)
    fractions = np.concatenate([corners, np.full((4, 2), 0.5, dtype=np.float32)], axis=1)
    return RegionFeatures(
        features, fractions, chances[:, 1:].max(axis=1), places.astype(np.float32), soft_labels=chances, size=(height, width)
    )


@dataclass
class Served:
    """A page that is served, and what became of it."""

    address: str = ""
    most_at_once: int = 0
    at_once: int = 0
    detected: int = 0
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    opened: threading.Event = field(default_factory=threading.Event)  # waited for where `seconds` are infinite

    def detect(self, pixels: np.ndarray) -> RegionFeatures:
        with self.lock:
            self.at_once += 1
            self.detected += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        if self.seconds == float("inf"):
            assert self.opened.wait(60)
        else:
            time.sleep(self.seconds)
        with self.lock:
            self.at_once -= 1
        return quarters(pixels)

    def ask(self, path: str, content: bytes | None = None, kind: str = "", **headers: str) -> tuple[int, Any, Any]:
        """Status, headers, and what was said: JSON, or bytes."""
        headers = {"Content-Type": kind, **headers} if content is not None else headers
        request = urllib.request.Request(self.address + path, content, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                said, status, told = answer.read(), answer.status, answer.headers
        except urllib.error.HTTPError as refused:
            said, status, told = refused.read(), refused.code, refused.headers
        return status, told, json.loads(said) if told.get_content_type() == "application/json" else said

    def upload(self, content: bytes, name: str = "photo.png") -> tuple[int, Any]:
        status, _, said = self.ask(f"photographs?name={urllib.parse.quote(name)}", content, "application/octet-stream")
        return status, said

    def question(self, question: str, keys: list[str], text: str) -> tuple[int, Any]:
        asked = json.dumps({"question": question, "photographs": keys, "text": text}).encode()
        status, _, said = self.ask("ask", asked, "application/json")
        return status, said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights, over three numbers a region and over the 512 of the detector on board."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    config = UniterConfig(**SIZES, image_feature_size=3, label_classes=3, initializer_range=0.2)
    on_board = UniterConfig(**SIZES, image_feature_size=512, label_classes=81)
    models = {
        "run": UniterForPretraining(config),
        "vqa": UniterForVqa(config, answers=6),
        "labels": UniterForClassification(config, labels=2),
        "score": UniterForClassification(config, labels=1, label_kind="score"),
        "on-board": UniterForPretraining(on_board),
    }
    answers = {"vqa": ["blue", "red", "<i>green</i>", "one", "two", "three"], "labels": ["good", "<i>bad</i>"]}
    for name, model in models.items():
        save_checkpoint(folder / name, model, about={"answers": answers[name]} if name in answers else {})
        (folder / name / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {name: folder / name for name in models}


def asked(*runs: Path) -> Understanding:
    return Understanding(KeptRegions(CLASSES, RegionOrigin("quarters", None, {})), *runs, device="cpu")


@contextlib.contextmanager
def serving(models: Understanding, *, most: int = 10) -> Iterator[Served]:
    served = Served()
    application = Application(
        models, Album(served.detect, most=most), class_names=CLASSES, attribute_names=(), detector="quarters", alone=True
    )
    with bound_socket("127.0.0.1", 0) as bound:
        served.address, server = address_of(bound), server_on(bound, application)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def models(runs: dict[str, Path]) -> Understanding:
    return asked(runs["run"], runs["vqa"])


@pytest.fixture
def served(models: Understanding) -> Iterator[Served]:
    with serving(models) as served:
        yield served


def picture(number: int = 0) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(".png", cv2.resize(pixels, (60, 48), interpolation=cv2.INTER_NEAREST))[1].tobytes()


# ---------------------------------------------------------------------------------------------------- photographs and questions


def test_a_photograph_comes_back_as_regions_and_as_a_picture(served: Served) -> None:
    status, photograph = served.upload(picture(), HOSTILE)
    assert status == 200 and (photograph["name"], photograph["width"], photograph["height"]) == (HOSTILE, 60, 48)
    assert [region["words"] for region in photograph["regions"]] == ["quarter", "quarter", "<b>bold</b>", "quarter"]
    assert [region["confidence"] for region in photograph["regions"]] == pytest.approx([0.9, 0.8, 0.7, 0.6], abs=1e-3)
    assert photograph["regions"][1]["box"] == [0.5, 0, 1, 0.5]
    assert all(re.fullmatch("#[0-9a-f]{6}", region["colour"]) for region in photograph["regions"])
    status, headers, shown = served.ask(f"photographs/{photograph['key']}")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(shown)).size == (60, 48)
    assert served.upload(picture(), HOSTILE) == (200, photograph) and served.detected == 1  # known by then


def test_what_is_asked_is_answered_as_understanding_does(served: Served, models: Understanding) -> None:
    pixels = [cv2.imdecode(np.frombuffer(picture(number), np.uint8), cv2.IMREAD_COLOR) for number in range(3)]
    keys = [served.upload(picture(number), f"{number}.png")[1]["key"] for number in range(3)]
    direct = Understanding(lambda images: [quarters(image) for image in images], device="cpu")
    direct._by_kind = models._by_kind  # the same models, over regions without an album

    status, matched = served.question("match", keys[:1], "a red square")
    assert status == 200 and matched["probability"] == pytest.approx(direct.match(pixels[0], "a red square").probability)
    assert [word["word"] for word in matched["words"]] == ["a", "red", "square"]
    assert all(sum(word["weights"]) == pytest.approx(1, abs=1e-4) and len(word["weights"]) == 4 for word in matched["words"])
    status, answered = served.question("answer", keys[1:2], "what color ?")
    expected = direct.answer(pixels[1], "what color ?").best
    assert status == 200 and len(answered["best"]) == 5
    assert [row["answer"] for row in answered["best"]] == [name for name, _ in expected]
    assert [row["probability"] for row in answered["best"]] == pytest.approx([value for _, value in expected])
    status, pointed = served.question("ground", keys[2:], "the red square")
    grounding = direct.ground(pixels[2], "the red square")
    assert status == 200 and pointed["zero_shot"] and pointed["region"] == grounding.region
    assert pointed["probabilities"] == pytest.approx(grounding.probabilities.tolist(), abs=1e-4)
    status, ranked = served.question("rank", keys, "a blue square")
    assert status == 200 and [row["key"] for row in ranked["order"]] == [
        keys[place] for place in direct.rank(pixels, "a blue square").order
    ]


def test_what_the_runs_cannot_answer_is_said_and_not_offered(runs: dict[str, Path]) -> None:
    with serving(asked(runs["run"])) as served:
        questions = served.ask("about")[2]["questions"]
        assert questions["match"] == {"by": str(runs["run"]), "why_not": None}
        assert questions["answer"]["by"] is None and "uniter-train finetune vqa" in questions["answer"]["why_not"]
        key = served.upload(picture())[1]["key"]
        assert served.question("answer", [key], "what color ?") == (400, {"error": questions["answer"]["why_not"]})
    with serving(asked()) as served:
        assert {values["by"] for values in served.ask("about")[2]["questions"].values()} == {None}
        assert len(served.upload(picture())[1]["regions"]) == 4


def test_questions_that_cannot_be_are_refused_in_words(served: Served) -> None:
    key = served.upload(picture())[1]["key"]

    def said(question: str, keys: list[str], text: str) -> str:
        status, told = served.question(question, keys, text)
        assert status in (400, 404), told
        return str(told["error"])

    assert "add at least two" in said("rank", [key], "a square")
    assert "asked of one" in said("match", [key, key], "a square")
    assert "holds no words" in said("match", [key], "  ")
    assert "shorten it" in said("match", [key], "a " * 700)
    assert "known are match" in said("mach", [key], "a square")
    assert "add it again" in said("match", ["0" * 64], "a square")
    for body in (
        b"{",
        b"[]",
        b'{"question": 1}',
        b"[" * 60_000,
        json.dumps({"question": "match", "photographs": [key] * 99, "text": ""}).encode(),
    ):
        status, _, told = served.ask("ask", body, "application/json")
        assert status == 400 and told["error"], body[:20]
    assert served.ask("ask", b"x" * 70_000, "application/json")[0] == 413
    assert served.ask("ask")[0] == 405 and served.ask("../../etc/passwd")[0] == 404 and served.ask("page.html")[0] == 404


# ---------------------------------------------------------------------------------------------------------------- what is refused


def test_what_is_no_image_is_refused_in_words(served: Served) -> None:
    for content, words in {
        b"%PDF-1.7 hello": "no image of a known kind",
        b"<html><body>": "no image but text",
        picture()[:-30]: "damaged or cut off",
        b"": "the file is empty",
    }.items():
        status, said = served.upload(content, "invoice.pdf")
        assert status == 400 and said["error"].startswith("invoice.pdf: ") and words in said["error"]


def test_a_picture_that_claims_too_much_is_refused_before_it_is_decoded(served: Served) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 16))) + chunk(b"IEND", b"")
    status, said = served.upload(bomb, "bomb.png")
    assert status == 400 and "claims 60000 x 60000 pixels" in said["error"] and served.detected == 0


@pytest.mark.parametrize("begins", [b"no image", picture()], ids=["no image", "an image"])
def test_fifty_megabytes_are_refused_in_words(served: Served, begins: bytes) -> None:
    status, said = served.upload(begins + bytes((50 << 20) - len(begins)), "large.bin")
    assert status == 413 and said["error"] == "large.bin: 50.0 MB are more than the 32 MB that are taken; make it smaller"
    assert PHOTOGRAPH_BYTES == 32 << 20 and served.detected == 0 and served.ask("about")[0] == 200


def test_other_pages_and_other_names_are_refused(served: Served) -> None:
    host = served.address.split("/")[2]
    kind = "application/octet-stream"
    assert served.ask("photographs", picture(), kind, Origin=f"http://{host}")[0] == 200
    assert served.ask("photographs", picture(), kind, Origin="https://elsewhere.example")[0] == 403
    assert served.ask("photographs", picture(), kind, Origin="null")[0] == 403
    assert served.ask("about", None, "", Host="elsewhere.example:8420")[0] == 403
    assert served.ask("about", None, "", Host="localhost.elsewhere.example")[0] == 403
    assert served.ask("about", None, "", Host="localhost:1")[0] == 200 and served.ask("about", None, "", Host="[::1]")[0] == 200
    # what a form of another page can send without being asked for leave
    for simple in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        assert served.ask("photographs", picture(), simple)[0] == 415


def test_a_body_without_its_length_or_without_its_end_is_refused(served: Served) -> None:
    for headers, status in (({"Transfer-Encoding": "chunked"}, 411), ({"Content-Length": "1000"}, 400)):
        connection = http.client.HTTPConnection(served.address.split("/")[2], timeout=60)
        connection.putrequest("POST", "/photographs")
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(b"0\r\n\r\n")
        assert connection.sock is not None
        connection.sock.shutdown(1)
        assert connection.getresponse().status == status
        connection.close()


def test_the_page_asks_nobody_else(served: Served) -> None:
    for path in ("", "page.css", "page.js", "stage.js", "elements.js"):
        status, headers, content = served.ask(path)
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"] and "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        assert "werkzeug" not in str(headers).lower() and "python" not in str(headers).lower()
        assert set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}", content.decode())) <= {"http://www.w3.org"}  # SVG's name, no address
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=|onclick=", content.decode())


# ---------------------------------------------------------------------------------------------------------------------- two at once


def test_two_clients_at_once_have_their_own_answers_one_after_the_other(served: Served) -> None:
    served.seconds = 0.1
    found: dict[int, Any] = {}

    def client(number: int) -> None:
        key = served.upload(picture(number), f"{number}.png")[1]["key"]
        found[number] = key, served.question("match", [key], "a red square")[1]["probability"]

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert served.most_at_once == 1 and served.detected == 4
    assert len({probability for _, probability in found.values()}) == 4
    for key, probability in found.values():
        assert served.question("match", [key], "a red square")[1]["probability"] == probability
    assert served.ask("waiting")[2] == {"waiting": 0}


def test_who_finds_no_place_in_the_queue_is_told_so(served: Served) -> None:
    served.seconds = float("inf")
    found: list[int] = []
    clients = [threading.Thread(target=lambda n=n: found.append(served.upload(picture(n), f"{n}.png")[0])) for n in range(PLACES + 4)]
    for one in clients:
        one.start()
    while len(found) < 4:
        time.sleep(0.01)
    assert found == [503] * 4 and served.ask("waiting")[2] == {"waiting": PLACES}
    served.opened.set()
    for one in clients:
        one.join()
    assert sorted(found) == [200] * PLACES + [503] * 4


def test_the_photograph_that_was_longest_unused_is_forgotten(models: Understanding) -> None:
    with serving(models, most=2) as served:
        keys = [served.upload(picture(number), f"{number}.png")[1]["key"] for number in range(2)]
        assert served.ask(f"photographs/{keys[0]}")[0] == 200
        keys.append(served.upload(picture(2), "2.png")[1]["key"])
        assert [served.ask(f"photographs/{key}")[0] for key in keys] == [200, 404, 200]


def test_a_fault_inside_is_one_sentence_and_goes_to_the_log(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(pixels: np.ndarray) -> RegionFeatures:
        raise RuntimeError("secret path /home/me")

    monkeypatch.setattr("uniter.cli.web.photographs.decode_image", broken)
    status, said = served.upload(picture())
    assert status == 500 and "terminal" in said["error"] and "secret" not in said["error"] and "secret" in caplog.text
    assert served.ask("waiting")[2] == {"waiting": 0}


# ------------------------------------------------------------------------------------------------------------------- the command


def test_this_machine_alone_is_served_unless_told() -> None:
    assert {option.name: option.default for option in main.params}["host"] == "127.0.0.1"
    for host, alone in (("127.0.0.1", True), ("0.0.0.0", False)):
        with bound_socket(host, 0) as bound:
            assert serves_this_machine_alone(bound) == alone and address_of(bound).startswith("http://127.0.0.1:")


def test_what_cannot_be_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, said in (
            (("--port", port), f"port {port} is taken by another program; choose another one with --port"),
            (("--host", "192.0.2.1"), "--host 192.0.2.1 is no address of this machine"),
            ((str(tmp_path / "none"), "--port", "0"), "none"),
        ):
            result = CliRunner().invoke(main, [*words])
            assert result.exit_code == 1 and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_run_that_no_question_goes_to_is_named(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = SimpleNamespace(
        class_names=CLASSES, origin=RegionOrigin("quarters", None, {}), detector=SimpleNamespace(name="q", attribute_names=())
    )
    monkeypatch.setattr("uniter.cli.web.loading.RegionExtractor", lambda *words, **chosen: found)
    monkeypatch.setattr("uniter.cli.web.loading.require_detectron2", lambda: None)
    same = runs["run"].parent / "same"
    if not same.exists():
        shutil.copytree(runs["run"], same)
    given = [str(runs["run"]), str(same), str(runs["vqa"])]
    chosen = dict.fromkeys(("weights", "tokenizer", "answers"))
    load_application(given, detector="q", other_detector=False, device="cpu", alone=True, **chosen)
    assert [record.args for record in caplog.records if record.levelname == "WARNING"] == [(given[0],)]


def test_the_command_from_its_start_to_ctrl_c(runs: dict[str, Path]) -> None:
    """The detector on board, a run over its regions, a real photograph; Ctrl-C is how it ends."""
    data = pytest.importorskip("skimage.data", reason="scikit-image ships the photograph")
    words = [sys.executable, "-m", "uniter.cli.app", "--from", runs["on-board"], "--port", "0", "--device", "cpu", "--json"]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["runs"] == [str(runs["on-board"])] and told["detector"] == "on-board"
        served = Served(told["address"])
        status, photograph = served.upload((Path(data.__file__).parent / "chelsea.png").read_bytes(), "chelsea.png")
        assert status == 200 and photograph["regions"][0]["words"] == "cat"
        assert 0 < served.question("match", [photograph["key"]], "a red square")[1]["probability"] < 1
    finally:
        process.send_signal(2)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in stderr


# ------------------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browsing(browser: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if browser.CHROMIUM is None:
        pytest.skip("no chromium here: the page was not tried in a browser (Debian: apt-get install chromium)")
    opened = browser.Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture(params=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browsing: Any, served: Served) -> Iterator[Any]:
    """The page, opened; at its end: it asked only its own server, complained of nothing, and fits the width."""
    width, height = (1280, 860) if request.param == "desktop" else (390, 844)
    browsing.requested.clear()
    browsing.complaints.clear()
    browsing.open(served.address, width=width, height=height, phone=request.param == "phone")
    browsing.until("document.querySelectorAll('#tabs button').length > 0")
    yield browsing
    assert browsing.value("document.documentElement.scrollWidth") <= width
    assert browsing.requested and all(address.startswith((served.address, "data:")) for address in browsing.requested)
    assert not browsing.complaints
    assert (
        browsing.value("[...document.querySelectorAll('button')].filter((b) => !(b.innerText.trim() || b.ariaLabel || b.title)).length")
        == 0
    )
    assert browsing.value("[...document.querySelectorAll('input')].filter((i) => !i.labels.length).length") == 0


def choose(page: Any, folder: Path, *numbers: int) -> None:
    files = [folder / f"{number}.png" for number in numbers]
    for number, file in zip(numbers, files, strict=True):
        file.write_bytes(picture(number))
    before = page.value("document.querySelectorAll('#thumbnails button.away').length")
    page.choose_files("#files", files)
    page.until(f"document.querySelectorAll('#thumbnails button.away').length === {before + len(files)} && !document.body.matches('.busy')")


def ask(page: Any, question: str, text: str) -> str:
    """With the keyboard; what the page answers."""
    page.value(f"document.querySelector('#tab-{question}').click(), document.querySelector('#text').focus()")
    page.type(text)
    page.press("Enter")
    page.until("document.querySelector('#answer').children.length > 0")
    return str(page.text("#answer"))


def test_four_questions_are_answered_on_the_page(page: Any, tmp_path: Path) -> None:
    assert "Drop a photograph here" in page.text() and "Add a photograph first" in page.text()
    choose(page, tmp_path, 0)
    assert [line for line in page.text("#region-list").splitlines() if line.strip()][:3] == ["0", "quarter", "0.90"]
    assert page.value("document.querySelectorAll('.box').length") == 4
    assert re.match(r"0\.\d\d\n", ask(page, "match", "a red square"))
    assert "What each word attends to" in page.text("#answer") and page.value("document.querySelectorAll('.word').length") == 3
    assert page.value("document.querySelector('#light').hidden")
    page.click("li:nth-child(3) > .word")
    assert not page.value("document.querySelector('#light').hidden")
    assert page.value("document.querySelector('li:nth-child(3) > .word').ariaPressed") == "true"
    answered = ask(page, "answer", "what color ?")
    assert page.value("document.querySelectorAll('.answers li').length") == 5 and "<i>green</i>" in answered
    assert "of 1 among all regions" in ask(page, "ground", "the red square") and "No run was trained to point" in page.text("#answer")
    assert page.value("document.querySelectorAll('.box:not([hidden])').length") == 1
    page.click("#tab-rank")
    assert "at least two photographs" in page.text("#status") and page.value("document.querySelector('#send').disabled")
    choose(page, tmp_path, 1, 2)
    ranked = ask(page, "rank", "a blue square")
    assert sorted(re.findall(r"\d\.png", ranked)) == ["0.png", "1.png", "2.png"]
    best = page.text(".ranking .best .name")
    assert page.value("document.querySelector('#thumbnails [aria-pressed=true]').title") == best


@pytest.mark.parametrize(("name", "shown"), [("labels", r"(good|<i>bad</i>)\s+0\.\d\d"), ("score", r"-?\d+\.\d+")])
def test_a_run_of_own_labels_is_asked_without_a_text(name: str, shown: str, browsing: Any, runs: dict[str, Path], tmp_path: Path) -> None:
    with serving(asked(runs[name])) as served:
        browsing.open(served.address)
        browsing.until("document.querySelectorAll('#tabs button').length > 0")
        assert browsing.value("document.querySelector('#tab-classify').ariaSelected") == "true"
        choose(browsing, tmp_path, 0)
        assert re.match(shown, ask(browsing, "classify", ""))
        assert browsing.value("document.querySelectorAll('.word').length") == 0
        ask(browsing, "classify", "a red square")
        browsing.until("document.querySelectorAll('.word').length === 3")


def test_hostile_names_and_texts_are_shown_as_they_are(page: Any, tmp_path: Path) -> None:
    file = tmp_path / HOSTILE
    file.write_bytes(picture())
    page.choose_files("#files", [file])
    page.until("document.querySelectorAll('#region-list li').length > 0")
    assert HOSTILE in page.text("#tray") and "<b>bold</b>" in page.text("#region-list")
    ask(page, "match", "<b>a</b>")
    assert "<" in page.text("#answer") and page.value("document.title") == "Ask about a photograph"
    assert page.value("document.querySelectorAll('b b, img[src=x], #region-list b, #tray b').length") == 0


def test_what_is_no_photograph_is_refused_on_the_page(page: Any, tmp_path: Path, served: Served) -> None:
    large, text = tmp_path / "film.bin", tmp_path / "letter.jpg"
    with open(large, "wb") as file:
        file.truncate(50 << 20)
    text.write_text("dear photograph")
    page.choose_files("#files", [large, text])
    page.until("document.querySelector('#fault').innerText.includes('letter.jpg')")
    assert "film.bin: 50 MB are more than the 32 MB that are taken" in page.text("#fault")
    assert "letter.jpg: it is no image of a known kind" in page.text("#fault")
    choose(page, tmp_path, 0)
    assert not page.text("#fault") and served.detected == 1


def test_the_page_is_used_with_the_keyboard_alone(page: Any, tmp_path: Path) -> None:
    choose(page, tmp_path, 0, 1)

    def focused() -> str:
        return str(page.value("document.activeElement.id || document.activeElement.className"))

    page.value("document.querySelector('#tab-match').focus()")
    page.press("ArrowRight")
    assert focused() == "tab-answer" and page.value("document.querySelector('#tab-answer').ariaSelected") == "true"
    page.press("End")
    assert focused() == "tab-rank"
    page.press("Tab")
    assert focused() == "text"
    page.press("Tab", times=2)  # past the button
    assert focused() == "row" and page.text(".box.pointed") == "0 quarter 0.90"
    page.press("ArrowDown")
    assert page.text(".box.pointed").startswith("1")
    page.value("document.querySelector('#thumbnails button').focus()")
    page.press("Enter")
    assert page.value("document.querySelector('#thumbnails button').ariaPressed") == "true"
    page.press("Tab")
    assert page.value("document.activeElement.ariaLabel") == "Remove 0.png"
    page.press("Enter")
    assert page.value("document.querySelectorAll('#thumbnails button.away').length") == 1


def test_what_no_run_can_answer_is_said_on_the_page(browsing: Any, runs: dict[str, Path]) -> None:
    with serving(asked(runs["run"])) as served:
        browsing.open(served.address)
        browsing.until("document.querySelectorAll('#tabs button').length > 0")
        browsing.click("#tab-answer")
        assert "uniter-train finetune vqa" in browsing.text("#why-not") and browsing.value("document.querySelector('#form').hidden")
        browsing.click("#tab-match")
        assert not browsing.text("#why-not") and not browsing.value("document.querySelector('#form').hidden")
    with serving(asked()) as served:
        browsing.open(served.address)
        browsing.until("document.querySelectorAll('#tabs button').length > 0")
        assert "No model was given" in browsing.text("#no-model") and not browsing.text("#tabs") and not browsing.text("#panel")
