"""What the page's server answers: its files, photographs in, answers out, as a WSGI application.

What a reader would get wrong: the browser is trusted with nothing. The page may load from here only, and no other page may ask here: what
does any work takes a content type that a foreign page cannot send without leave, the name in the address must be one of this machine's (or
a page elsewhere could give itself its name), and a photograph is found only by who has it.
"""

import contextlib
import ipaddress
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from werkzeug.exceptions import (
    BadRequest,
    Forbidden,
    HTTPException,
    LengthRequired,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
    ServiceUnavailable,
    UnsupportedMediaType,
)
from werkzeug.wrappers import Request, Response

from uniter.cli.web.photographs import Album, Photograph, described
from uniter.cli.web.questions import abilities, answer
from uniter.cli.web.turns import TooManyWait, Turns
from uniter.datasets.errors import BadInput, UniterError
from uniter.model.understanding.asking import Understanding

log = logging.getLogger(__name__)

PHOTOGRAPH_BYTES: Final = 32 << 20  # phones' photographs have 3 to 15 MB
DROPPED_BYTES: Final = 1 << 30  # of a file that is too large; who sends more is cut off
QUESTION_BYTES: Final = 64 << 10
ASKED_AT_ONCE: Final = 64  # photographs of one question
NAME_LETTERS: Final = 120
FILES: Final = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/stage.js": ("stage.js", "text/javascript"),
    "/elements.js": ("elements.js", "text/javascript"),
}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Application:
    """The server's side of the page.

    Args:
        asked: the models; its regions are `photographs.KeptRegions`.
        album: takes photographs in.
        class_names, attribute_names: the detector's.
        detector: its name, for the page.
        alone: this machine alone is served, and the server goes by no name but its own.
    """

    def __init__(
        self,
        asked: Understanding,
        album: Album,
        *,
        class_names: Sequence[str],
        attribute_names: Sequence[str],
        detector: str,
        alone: bool,
    ) -> None:
        self._asked, self._album, self._turns = asked, album, Turns()
        self._class_names, self._attribute_names, self._alone = class_names, attribute_names, alone
        self._about = {
            "questions": abilities(asked),
            "detector": detector,
            "classes": len(class_names),
            "largest": PHOTOGRAPH_BYTES,
            "alone": alone,
        }
        folder = Path(__file__).parent
        self._files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        response = self._respond(request)
        _receive_the_rest(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        try:
            self._refuse_strangers(request)
            return self._route(request)
        except TooManyWait as error:
            return _said(str(error), ServiceUnavailable.code)
        except UniterError as error:
            return _said(str(error), BadRequest.code)
        except HTTPException as error:
            return _said(error.description or error.name, error.code)
        except Exception:
            log.exception("the page could not be answered")
            return _said("something went wrong in the program; the terminal in which uniter-app runs says what", 500)

    def _refuse_strangers(self, request: Request) -> None:
        host = request.headers.get("Host", "")
        if self._alone and not _is_this_machine(host):
            raise Forbidden(f"this server does not go by the name {host[:NAME_LETTERS]!r}; open the address that uniter-app printed")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Forbidden("another page asks; only the page of this server may")

    def _route(self, request: Request) -> Response:
        if request.path in self._files:
            _refuse_other_than(request, "GET")
            content, kind = self._files[request.path]
            return Response(content, content_type=f"{kind}; charset=utf-8")
        if request.path == "/about":
            _refuse_other_than(request, "GET")
            return _json(self._about)
        if request.path == "/waiting":
            _refuse_other_than(request, "GET")
            return _json({"waiting": self._turns.taken})
        if request.path == "/photographs":
            _refuse_other_than(request, "POST")
            return self._take(request)
        if request.path.startswith("/photographs/"):
            _refuse_other_than(request, "GET")
            return Response(self._photograph(request.path.removeprefix("/photographs/")).shown, content_type="image/jpeg")
        if request.path == "/ask":
            _refuse_other_than(request, "POST")
            return self._answer(request)
        raise NotFound("there is nothing here of that name")

    def _take(self, request: Request) -> Response:
        name = (request.args.get("name") or "photograph")[-NAME_LETTERS:]
        with self._turns.place():
            content = _body(request, "application/octet-stream", PHOTOGRAPH_BYTES, name)
            photograph = self._turns.do(lambda: self._album.add(name, content))
        return _json(described(photograph, self._class_names, self._attribute_names))

    def _answer(self, request: Request) -> Response:
        with self._turns.place():
            content = _body(request, "application/json", QUESTION_BYTES, "the question")
            question, keys, text = _question(content)
            photographs = [self._photograph(key) for key in keys]
            return _json(self._turns.do(lambda: answer(self._asked, question, photographs, text)))

    def _photograph(self, key: str) -> Photograph:
        try:
            return self._album.get(key)
        except KeyError:
            raise NotFound("this photograph is no longer kept; add it again") from None


def _is_this_machine(host: str) -> bool:
    """Of a `Host` header, without asking anybody what a name stands for."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _refuse_other_than(request: Request, method: str) -> None:
    if request.method != method and (method, request.method) != ("GET", "HEAD"):
        raise MethodNotAllowed([method], f"{request.method} is not answered here, {method} is")


def _body(request: Request, kind: str, most: int, name: str) -> bytes:
    """What was sent, refused unread where it is too large."""
    if request.mimetype != kind:
        raise UnsupportedMediaType(f"{name}: sent as {request.mimetype or 'nothing'!r}, expected {kind}")
    if request.content_length is None:
        raise LengthRequired(f"{name}: its length was not said")
    if request.content_length > most:
        size = f"{request.content_length / (1 << 20):.1f} MB"
        raise RequestEntityTooLarge(f"{name}: {size} are more than the {most / (1 << 20):.3g} MB that are taken; make it smaller")
    content = request.stream.read(most + 1)
    if len(content) != request.content_length:
        raise BadRequest(f"{name}: it ends after {len(content):,} of {request.content_length:,} bytes; send it again")
    if not content:
        raise BadRequest(f"{name}: the file is empty")
    return content


def _receive_the_rest(request: Request) -> None:
    """Take what is still sent, and drop it: a browser that is interrupted while it sends does not read why it was refused."""
    if (request.content_length or 0) <= DROPPED_BYTES:
        with contextlib.suppress(HTTPException, OSError):
            while request.stream.read(1 << 20):
                pass


def _question(content: bytes) -> tuple[str, list[str], str]:
    """The question's name, the photographs' keys and the text."""
    try:
        asked = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the question is no JSON: {error}") from None
    if not isinstance(asked, dict):
        raise BadInput("the question is no JSON object")
    question, keys, text = asked.get("question"), asked.get("photographs"), asked.get("text")
    if not isinstance(question, str) or not isinstance(text, str) or not isinstance(keys, list):
        raise BadInput("the question needs a name ('question'), keys of photographs ('photographs', a list) and a text ('text')")
    if not all(isinstance(key, str) for key in keys) or len(keys) > ASKED_AT_ONCE:
        raise BadInput(f"'photographs' are {len(keys)} values; expected at most {ASKED_AT_ONCE} keys")
    return question, keys, text


def _json(values: Any) -> Response:
    return Response(json.dumps(values), content_type="application/json")


def _said(sentence: str, status: int | None) -> Response:
    return Response(json.dumps({"error": sentence}), status=status or 500, content_type="application/json")
