"""What decoders write to the terminal while they decode: kept out of the progress, counted, and said once.

libjpeg and libpng write to file descriptor 2 from C, past Python, and neither OpenCV nor Pillow has a switch for it. So for the time
descriptor 2 leads into a pipe, whose reader takes their sentences out and hands all else on at once.

What a reader would get wrong: such a sentence is no failure. A JPEG has no checksum; where its decoder stumbles and goes on, the pixels are
those of `cv2.imread`, and they are used. What is known to be damaged fails in `decoding`, without a word on the terminal.
"""

import contextlib
import faulthandler
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Final

log = logging.getLogger(__name__)

_STARTS: Final = (
    rb"Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence|Invalid SOS parameters|Unknown Adobe color transform|"
    rb"Warning: unknown JFIF revision|libpng warning|libpng error"
)
_SENTENCE: Final = re.compile(rb"(?:" + _STARTS + rb")[^\n]*\n")
_BEGUN: Final = re.compile(rb"(?:" + _STARTS + rb")[^\n]*\Z")
_END: Final = b"\0uniter: the end of what is read here\n"
_KINDS_SAID: Final = 3

_lock = threading.Lock()
_at_work = False


@contextlib.contextmanager
def counted_decoder_words() -> Iterator[None]:
    """Take what decoders say out of stderr, and log at the end how often they said what; within another such call nothing more."""
    global _at_work
    with _lock:
        outermost, _at_work = not _at_work, True
    if not outermost:
        yield
        return
    try:
        yield from _filtered()
    finally:
        _at_work = False


def _filtered() -> Iterator[None]:
    try:
        real = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    reading, writing = os.pipe()
    words: Counter[str] = Counter()
    drained = threading.Event()
    os.dup2(writing, 2)
    os.close(writing)
    threading.Thread(target=_hand_on, args=(reading, os.dup(real), words, drained), daemon=True, name="decoder words").start()
    crashes = not faulthandler.is_enabled()
    if crashes:  # what the C library says of a crash would end in the pipe
        faulthandler.enable(file=real)
    try:
        yield
    finally:
        if crashes:
            faulthandler.disable()
        os.write(2, _END)
        os.dup2(real, 2)
        os.close(real)
        drained.wait(timeout=5)
        _say(words)


def _hand_on(reading: int, real: int, words: Counter[str], drained: threading.Event) -> None:
    """Until nobody writes any more: a process that was started meanwhile may outlive the run."""
    kept = b""
    while chunk := os.read(reading, 1 << 16):
        text = kept + chunk
        over = text.endswith(_END)
        for found in _SENTENCE.findall(text):
            words[re.sub(r"0x[0-9a-f]+|\d+", "N", found.decode(errors="replace").strip())] += 1
        text = _SENTENCE.sub(b"", text.replace(_END, b""))
        begun = _BEGUN.search(text)
        text, kept = (text[: begun.start()], text[begun.start() :]) if begun else (text, b"")
        with contextlib.suppress(OSError):  # nobody reads it
            while text:
                text = text[os.write(real, text) :]
        if over:
            drained.set()
    os.close(reading)
    os.close(real)


def _say(words: Counter[str]) -> None:
    if words:
        said = "; ".join(f"{what} ({count:,} times)" for what, count in words.most_common(_KINDS_SAID))
        more = f"; and {len(words) - _KINDS_SAID} other sentences" if len(words) > _KINDS_SAID else ""
        log.warning("decoders found fault with pictures and went on, as cv2.imread does; they are used as they came out: %s%s", said, more)
