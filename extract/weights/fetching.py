"""Fetching a file over https once: under a lock, with progress, going on where an earlier try broke off, its SHA-256 remembered.

Easy to get wrong: a file that is continued must be the one that was begun (`If-Range` asks the server that), and a server that does not
answer with a part sends the whole again. A redirection may not leave https either.
"""

import hashlib
import http.client
import json
import logging
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.progress import Progress
from uniter.datasets.storage.files import read_json_object, sha256_of, sync, write_json
from uniter.datasets.storage.locks import file_lock
from uniter.extract.weights.cache import cache_folder

log = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_S = 30


TRIES = 3
"""Connections for one file, if each brought a part of it."""


_PLAIN_HOSTS: frozenset[str] = frozenset()
"""Hosts that are asked over http all the same: none. Tests put 127.0.0.1 here."""


def is_protected(url: str) -> bool:
    """Whether nobody on the way can change what a URL names."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _PLAIN_HOSTS)


def check_protected(url: str) -> None:
    """UniterError where what a URL names could be changed on its way."""
    if not is_protected(url):
        raise UniterError(f"{url}: not an https address; weights that anybody on the way may change are not fetched, so use https")


def fetched_path(url: str) -> Path:
    """Where the file behind a URL is or will be; `#sha256=` is no part of what tells files apart."""
    plain = url.partition("#")[0]
    base = re.sub(r"[^\w.-]", "_", plain.split("?")[0].rstrip("/").rsplit("/", 1)[-1]) or "file"
    return cache_folder() / "downloads" / f"{hashlib.sha256(plain.encode()).hexdigest()[:16]}-{base}"


def fetch(url: str) -> Path:
    """The local file behind an https URL, fetched the first time; processes that want the same file wait for the one that fetches it.

    Args:
        url: may end in `#sha256=HEX`, which the file must then have. Without it the first fetch's is remembered, and a warning says when
            another fetch brings another file.

    Raises:
        UniterError: the URL is no https one, or the file cannot be had; what has come is kept for the next try.
        BadInput: the file is not the one that `#sha256=` names.
    """
    plain, _, fragment = url.partition("#")
    expected = _expected_sha256(url, fragment)
    target = fetched_path(url)
    if not target.is_file():
        check_protected(plain)
        try:
            _fetch_alone(plain, target)
        except urllib.error.HTTPError as error:
            raise UniterError(f"{plain}: the server answers {error.code} {error.reason}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UniterError(f"{plain}: {getattr(error, 'reason', None) or str(error) or type(error).__name__}") from error
    if expected is not None and (got := sha256_of(target)) != expected:
        discard(target)
        raise BadInput(f"{plain}: its SHA-256 is {got}, not {expected} as was asked for; the file is not kept")
    return target


def discard(target: Path) -> None:
    """Throw a fetched file away that turned out to be none, and what was remembered of it; what was remembered before stays."""
    target.unlink(missing_ok=True)
    before = _remembered(target).get("before")
    if isinstance(before, dict):
        write_json(_record(target), before)
    else:
        _record(target).unlink(missing_ok=True)


def _expected_sha256(url: str, fragment: str) -> str | None:
    if not fragment:
        return None
    name, _, value = fragment.partition("=")
    if name != "sha256" or not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise BadInput(f"{url}: expected nothing behind the #, or sha256= and 64 hexadecimal digits")
    return value.lower()


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _remembered(target: Path) -> dict[str, Any]:
    try:
        return read_json_object(_record(target))
    except (OSError, BadInput):
        return {}


def _fetch_alone(url: str, target: Path) -> None:
    """Fetch under the file's lock, unless another process did so meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with file_lock(lock, wait=False, remove=True) as mine:
        if mine:
            _fetch_and_remember(url, target)
            return
    log.info("%s: another process is fetching it; waiting for that", url)
    with file_lock(lock, wait=True, remove=True):
        _fetch_and_remember(url, target)


def _fetch_and_remember(url: str, target: Path) -> None:
    if target.is_file():
        return
    part = target.with_name(f"{target.name}.part")
    for attempt in range(1, TRIES + 1):
        had = part.stat().st_size if part.is_file() else 0
        try:
            _receive(url, part)
            break
        except (OSError, http.client.HTTPException, _CutOff) as error:
            brought = (part.stat().st_size if part.is_file() else 0) - had
            if isinstance(error, urllib.error.HTTPError) or attempt == TRIES or brought <= 0:
                raise UniterError(f"{url}: {error}; the same command goes on from there") if isinstance(error, _CutOff) else error from None
            log.warning("%s: the connection broke off (%s); going on from byte %s", url, error, f"{had + brought:,}")
    sync(part)
    digest, before = sha256_of(part), _remembered(target)
    if "sha256" in before and before["sha256"] != digest:
        log.warning(
            "%s: the file has CHANGED since it was first fetched: its SHA-256 was %s and is now %s; databases made with the one are not "
            "to be mixed with those of the other", url, before["sha256"], digest,
        )  # fmt: skip
    else:
        log.info("%s: %s bytes, SHA-256 %s", url, f"{part.stat().st_size:,}", digest)
    record = {"url": url, "sha256": digest, "bytes": part.stat().st_size, "fetched": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    before.pop("before", None)
    write_json(_record(target), {**record, "before": before or None})
    part.replace(target)
    _state(part).unlink(missing_ok=True)


class _CutOff(Exception):
    """The connection ended before the file did."""


def _state(part: Path) -> Path:
    """What the server called the version of the file that was begun."""
    return part.with_name(f"{part.name}.json")


class _StaysProtected(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_protected(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(url: str, part: Path) -> None:
    """Add to the part what it lacks, or begin it anew where it cannot be continued."""
    begun, version = _begun(part)
    headers = {"Range": f"bytes={begun}-", "If-Range": version} if begun and version else {}
    opener = urllib.request.build_opener(_StaysProtected)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=DOWNLOAD_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and headers:
            part.unlink()  # what is here is no beginning of what is there
            return _receive(url, part)
        raise
    with answer:
        continues = answer.status == http.client.PARTIAL_CONTENT and _starts_at(answer.headers, begun)
        if answer.status == http.client.PARTIAL_CONTENT and not continues:
            raise ValueError("the server sent another part of the file than the one that was asked for")
        begun = begun if continues else 0
        length = answer.headers.get("Content-Length")
        total = begun + int(length) if length and length.isdecimal() else None
        if not continues:
            part.unlink(missing_ok=True)
            write_json(_state(part), {"version": _version(answer.headers)})
        log.info("fetching %s%s", url, f", from byte {begun:,} on" if begun else "")
        received = begun
        with part.open("ab") as file, Progress(total, unit="bytes", label="fetching", done=begun) as progress:
            while block := answer.read(1 << 20):
                received += file.write(block)
                progress.update(len(block))
    if total is not None and received < total:
        raise _CutOff(f"the download ended after {received:,} of {total:,} bytes")


def _begun(part: Path) -> tuple[int, str | None]:
    """How many bytes are here already, and of which version of the file."""
    try:
        version = json.loads(_state(part).read_bytes())["version"]
        return part.stat().st_size, version if isinstance(version, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None


def _version(headers: Any) -> str | None:
    """A strong ETag, else the time of the last change."""
    tag: str | None = headers.get("ETag")
    changed: str | None = headers.get("Last-Modified")
    return tag if tag and not tag.startswith("W/") else changed


def _starts_at(headers: Any, byte: int) -> bool:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range") or "")
    return match is not None and int(match[1]) == byte
