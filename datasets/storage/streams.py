"""Opening other people's text and JSON: gzip, byte-order marks, CRLF, cut-off files; always a stream, never the whole."""

import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import ijson
import orjson

from uniter.datasets.errors import BadInput

LONGEST_LINE = 16 << 20  # bytes; a text of that length is no caption


MOST_WHOLE_BYTES = 1 << 30  # of a JSON file that is read as a whole


MOST_UNPACKING = 100  # times its own size a packed one may become, beyond `FREE_BYTES`; JSON packs to a fifth or a twentieth


FREE_BYTES = 16 << 20


DEEPEST = 500  # JSON inside JSON; ijson keeps a path for each level, so 100,000 levels would take 25 GB


UTF8_BOM = b"\xef\xbb\xbf"


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if it is gzip, without a UTF-8 byte-order mark.

    Raises:
        BadInput: it is not there, or UTF-16, or its gzip is damaged (raised while reading, too).
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), 1 << 20)) if packed else raw
            start = stream.read(3)
            if start[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in start[:2] and start[:2] != b"\0\0"):
                raise BadInput(f"{path} is UTF-16 text; save it as UTF-8")
            if start != UTF8_BOM:
                stream.seek(0)
            yield stream
    except FileNotFoundError:
        raise BadInput(f"{path} is not there; expected a file, is its name right?") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder; expected a file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path} is damaged gzip ({error}); was it cut off?") from None


def first_character(path: Path) -> str:
    """The first byte that is no white space, as a character; "" of an empty file. A JSON file may be one line of gigabytes."""
    with open_stream(path) as stream:
        while block := stream.read(1 << 16):
            if block := block.lstrip():
                return chr(block[0])
    return ""


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with open_stream(path) as stream:
        return stream.read(len(magic)) == magic


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file without their ends; bytes that are not UTF-8 become U+FFFD, which no tokeniser sees."""
    with open_stream(path) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise BadInput(f"line {number:,} of {path} is longer than {LONGEST_LINE >> 20} MiB; is it a text file of captions?")
            yield line.decode("utf-8", "replace").rstrip("\r\n")


def whole_json(path: Path, wanted: str = "", *, most_bytes: int = MOST_WHOLE_BYTES) -> Any:
    """Somebody's JSON file as a whole, packed or not.

    Args:
        wanted: what was expected of it, for the sentence: "COCO's instances".
        most_bytes: how large it may be, unpacked.

    Raises:
        BadInput: it is not there, no JSON, cut off, too large, or nested too deeply.
    """
    with open_stream(path) as stream:
        most = min(most_bytes, _most_unpacked(path, stream))
        content = stream.read(most + 1)
        if len(content) > most:
            raise BadInput(f"{path} has more than {most:,} bytes of JSON; expected {wanted or 'a smaller file'}, is it the right file?")
    return json_value(content, str(path), wanted)


def _most_unpacked(path: Path, stream: BinaryIO) -> int:
    """How many bytes of JSON a file may hold: of what is packed more is no JSON that anybody wrote, and would fill the memory."""
    packed = isinstance(stream, io.BufferedReader) and isinstance(stream.raw, gzip.GzipFile)
    return FREE_BYTES + MOST_UNPACKING * path.stat().st_size if packed else sys.maxsize


def json_lines(path: Path, wanted: str = "one object a line") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of somebody's JSONL file, each with where it stands ("line 3 of train.jsonl"); empty lines are passed over.

    Raises:
        BadInput: a line is no JSON object; it is cut off, or the file is a single JSON document.
    """
    for number, line in enumerate(lines_of(path), start=1):
        if line and not line.isspace():
            where = f"line {number:,} of {path}"
            yield where, object_of(json_value(line, where, wanted), where)


def json_value(text: str | bytes, where: str, wanted: str = "") -> Any:
    """What a piece of JSON says; halves of surrogate pairs and NaN, which Python's json writes, are taken.

    Raises:
        BadInput: it is no JSON, naming `where` and what was `wanted`.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        reason = str(error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        expected = f"; expected {wanted}, was it cut off?" if wanted else "; was it cut off?"
        raise BadInput(f"{where} is not JSON ({reason}){expected}") from None


def json_items(path: Path, prefix: str) -> Iterator[Any]:
    """The values of a JSON file at a prefix as ijson writes it ("annotations.item"), one at a time.

    Raises:
        BadInput: it is no JSON, or cut off.
    """
    yield from _json(path, lambda stream: ijson.items(stream, prefix, use_float=True, buf_size=1 << 18))


def json_events(path: Path) -> Iterator[tuple[str, str, Any]]:
    """ijson's (prefix, event, value) of a JSON file."""
    yield from _json(path, lambda stream: ijson.parse(stream, use_float=True, buf_size=1 << 16))


def json_pairs(path: Path) -> Iterator[tuple[str, Any]]:
    """The names and values of a JSON object, one at a time."""
    yield from _json(path, lambda stream: ijson.kvitems(stream, "", use_float=True, buf_size=1 << 18))


class _Checked:
    """A stream of JSON for ijson, without what would bring it down or to a halt.

    It breaks off where JSON is nested deeper than `DEEPEST` (within one block it may be three times as deep) or unpacks to more than
    `_most_unpacked`, and halves of surrogate pairs (\\ud83d alone), which Python's json writes and yajl refuses, become U+FFFD.
    """

    _IN_ESCAPES: Final = b'\\/"0123456789ABCDEFabcdefnrtu'
    _BESIDE: Final = bytes(set(range(256)) - set(b'"[]{}'))
    _ESCAPES: Final = re.compile(
        rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[dD][89a-fA-F][0-9a-fA-F]{2}|.)", re.DOTALL
    )
    _ESCAPED: Final = re.compile(rb"\\.", re.DOTALL)

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._left = _most_unpacked(path, stream)
        self._held = b""
        self._depth, self._in_string = 0, False

    def read(self, size: int = -1) -> bytes:
        fresh = self._fresh(size)
        block = self._held + fresh
        # No escape, nor pair of them, may be cut in two: what could be a part of one waits for what follows it.
        while fresh and not block.rstrip(self._IN_ESCAPES) and len(block) < LONGEST_LINE:
            fresh = self._fresh(size)
            block += fresh
        end = len(block.rstrip(self._IN_ESCAPES)) if fresh else 0
        block, self._held = (block[:end], block[end:]) if end else (block, b"")
        marks = block
        if b"\\" in block:
            if b"\\ud" in block or b"\\uD" in block:
                block = self._ESCAPES.sub(lambda found: b"\\ufffd" if len(found[0]) == 6 else found[0], block)
            marks = self._ESCAPED.sub(b"", block)
        parts = marks.translate(None, self._BESIDE).split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        # What is opened and closed within the block goes away layer by layer: "{[{}{}]" -> "{[]" -> "{".
        for _ in range(DEEPEST):
            inner, outside = outside, outside.replace(b"{}", b"").replace(b"[]", b"")
            if outside == inner:
                break
        opened = outside.count(b"[") + outside.count(b"{")
        self._depth += 2 * opened - len(outside)  # what is left closes first, then opens
        if self._depth > DEEPEST:
            raise BadInput(f"{self._path} is JSON nested more than {DEEPEST} deep; is it a file of captions or annotations?")
        return block

    def _fresh(self, size: int) -> bytes:
        fresh = self._stream.read(size)
        self._left -= len(fresh)
        if self._left < 0:
            raise BadInput(f"{self._path} unpacks to more than {MOST_UNPACKING} times its size; is it a file of captions or annotations?")
        return fresh


def _json(path: Path, parse: Callable[[BinaryIO], Iterator[Any]]) -> Iterator[Any]:
    with open_stream(path) as stream:
        try:
            yield from parse(cast(BinaryIO, _Checked(stream, path)))
        except (ijson.JSONError, ValueError, ArithmeticError) as error:
            reason = _first_line(error)
            if "premature EOF" in reason or "incomplete" in reason.lower():
                raise BadInput(f"{path} ends or breaks in the middle ({reason}); was it cut off? Fetch it again") from None
            if "UTF8" in reason or isinstance(error, UnicodeDecodeError):
                raise BadInput(f"{path} holds bytes that are not UTF-8 ({reason}); save it as UTF-8") from None
            raise BadInput(f"{path} is not JSON ({reason}); is it the right file, was a part of it lost?") from None


def _first_line(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    return (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).strip().split("\n")[0] or type(error).__name__


def text_of(value: Any, where: str) -> str:
    """A caption's text as sources have it: null is empty, numbers are their digits.

    Raises:
        BadInput: it is a list or an object.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    raise BadInput(f"the caption of {where} is a JSON {type(value).__name__}; expected a string")


def id_of(value: Any, row: int, row_prefix: str = "") -> str:
    """An example's id: what the source says, else its row, which bears a prefix where there are several files."""
    if type(value) is int or type(value) is str:  # nearly all are
        return str(value)
    if value is None or isinstance(value, list | dict):
        return f"{row_prefix}{row}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def object_of(value: Any, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadInput: it is something else.
    """
    if not isinstance(value, dict):
        raise BadInput(f"{where} is a JSON {type(value).__name__}; expected an object")
    return value
