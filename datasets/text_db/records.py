"""One example's record: lz4-framed msgpack, to bytes and back."""

from functools import partial
from typing import Any

import lz4.frame
import msgpack

from uniter.datasets.errors import BadInput, UniterError

LARGEST_RECORD = 64 << 20  # bytes; a longer one is an attack or damage


class MissingExample(UniterError, KeyError):
    """There is no example of that id."""

    def __str__(self) -> str:  # KeyError would quote the sentence
        return str(self.args[0])


compress_record = partial(lz4.frame.compress, content_checksum=True)
"""msgpack -> an lz4 frame with a checksum, which every reader of lz4 frames verifies."""


def decode_text_record(value: bytes | memoryview, *, example: str | bytes) -> dict[str, Any]:
    """The record of an example (its id is for messages); tuples come back as lists.

    Raises:
        BadInput: the bytes are no such record, or a hostile one.
    """
    try:
        # lz4 expands 255 times at most; the limit is also what gets allocated, so it must fit the record.
        limit = min(LARGEST_RECORD, 255 * len(value) + 1024)
        plain, _, ended = lz4.frame.decompress_chunk(lz4.frame.create_decompression_context(), value, max_length=limit)
        if not ended:
            raise ValueError(f"it holds more than {LARGEST_RECORD} bytes" if len(plain) == limit else "the compressed frame does not end")
        record = msgpack.unpackb(plain, raw=False)
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__}, not a map")
    except (ValueError, RuntimeError, EOFError, TypeError, msgpack.UnpackException) as error:
        raise BadInput(f"text record {spelt(example)!r} is damaged ({error}); rebuild the database, or leave this one out") from None
    return record


def spelt(example: str | bytes) -> str:
    """An example's id as messages show it; bytes that are no UTF-8 become question marks."""
    return example if isinstance(example, str) else example.decode("utf-8", "replace")
