"""Captions on their way into a database: tokenised, packed and spooled in sorted runs."""

import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgpack
import numpy as np
import orjson

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.index_file import hash_key
from uniter.datasets.storage.lmdb_pages import MAX_KEY_BYTES
from uniter.datasets.text_db.building.image_names import ImageNames, whole_text
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.records import compress_record
from uniter.datasets.text_db.tokenizer import Tokenizer

BATCH = 4096  # captions tokenised at once
RUN_BYTES = 48 << 20  # of records held before they are sorted and written out
LONGEST_ID: Final = MAX_KEY_BYTES
LONG, TOO_LONG = 60, 512  # word pieces: UNITER's max_txt_len, and BERT's positions

Length = Callable[[Mapping[str, Any]], int]


@dataclass
class _Block:
    """What a batch of captions adds to the columns."""

    ids: list[str] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    images: list[str | list[str]] = field(default_factory=list)
    image_numbers: "array[int]" = field(default_factory=lambda: array("i"))
    texts: "array[int]" = field(default_factory=lambda: array("q"))
    checksums: "array[int]" = field(default_factory=lambda: array("I"))


class Spool:
    """Takes captions in, holds one run of records at most, leaves sorted runs and columns in the working folder.

    Attributes:
        runs: files of (id, record, number), each sorted.
        record_bytes: what the LMDB will need at least.
        width: how many images an example is about.
    """

    def __init__(
        self,
        work: Path,
        folder: Path,
        tokenizer: Tokenizer,
        images: ImageNames,
        lengths: Mapping[str, Length],
        *,
        may_lack_text: bool = False,
    ) -> None:
        self._may_lack_text = may_lack_text
        self._work, self._tokenizer, self.images, self._length_of = work, tokenizer, images, dict(lengths)
        self.read = self.kept = self.empty = self.long = self.too_long = self.special = self.without_image = 0
        self.first_without_image: str | None = None
        self.runs: list[Path] = []
        self.record_bytes = self.width = 0
        self._run: list[tuple[bytes, bytes, int]] = []
        self._run_bytes = 0
        self._packer = msgpack.Packer(use_bin_type=True)
        self._run_packer = msgpack.Packer(use_bin_type=True)
        self.length_names = tuple(self._length_of)
        columns = ("ids", "id_lengths", "images", "id_hashes", "texts", "checksums", *self._length_of)
        self._columns = {name: open(work / name, "wb") for name in columns}  # noqa: SIM115 - closed in close()
        self._id2len = {name: JsonObject(folder / f"{name}.json") for name in self._length_of}
        self._txt2img = JsonObject(folder / "txt2img.json")
        self._special_ids = frozenset((tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id))

    def counts(self) -> dict[str, int]:
        """How many texts were read, kept and left out, by the names of `BuildReport.counts`."""
        return {
            "read": self.read,
            "kept": self.kept,
            "empty": self.empty,
            "longer_than_60": self.long,
            "longer_than_512": self.too_long,
            "duplicate": 0,
            "special_words": self.special,
            "without_image": self.without_image,
            "names_sharing_a_key": 0,
            "excluded": 0,
        }

    def add(self, batch: Sequence[Caption]) -> None:
        """Take captions in: each finds its images, becomes a record, then bytes of the run that is held; the columns are written."""
        self.read += len(batch)
        block = _Block()
        lengths: dict[str, array[int]] = {name: array("i") for name in self._length_of}
        for caption, pieces in zip(batch, self._tokenizer.encode_batch([caption.text or "" for caption in batch]), strict=True):
            example, names, text, _, fields, _ = caption
            if not pieces and not self._may_lack_text and not (fields and fields.get("input_ids")):
                self.empty += 1
                continue
            found = self.images.of(names)
            if found is None:
                self.without_image += 1
                self.first_without_image = self.first_without_image or (names if isinstance(names, str) else ", ".join(names))
                continue
            numbers, image = found
            if len(numbers) != self.width:
                if self.width:
                    raise BadInput(f"text {example!r} is about {len(numbers)} images, those before about {self.width}; expected as many")
                self.width = len(numbers)

            record = self._record(caption, pieces, image)
            try:
                key, value = example.encode(), self._packed(example, record)
            except UnicodeEncodeError:
                record, example = whole_text(record), whole_text(example)
                key, value = example.encode(), self._packed(example, record)
            if not 0 < len(key) <= LONGEST_ID:
                raise BadInput(
                    f"the id of one of the first {self.read:,} texts has {len(key)} bytes, expected 1 to {LONGEST_ID}: {example[:60]!r}"
                )
            # Of the record itself: how lz4 packs it may change with its version.
            block.checksums.append(zlib.crc32(value))
            value = compress_record(value)
            self._run.append((key, value, self.kept))
            size = len(key) + len(value)
            self._run_bytes += size
            self.record_bytes += size + 16 if size < 1900 else size + 4096 + 64

            self.kept += 1
            pieces = record["input_ids"]
            if len(pieces) > LONG:
                self.long += 1
                self.too_long += len(pieces) > TOO_LONG
            self.special += not self._special_ids.isdisjoint(pieces)
            block.ids.append(example)
            block.keys.append(key)
            block.images.append(image)
            block.image_numbers.extend(numbers)
            block.texts.append(hash((image if isinstance(image, str) else tuple(image), text)))
            for name, length_of in self._length_of.items():
                lengths[name].append(length_of(record))
        self._write_columns(block, lengths)
        if self._run_bytes >= RUN_BYTES:
            self._write_run()
        self.images.forget()

    def _record(self, caption: Caption, pieces: list[int], image: str | list[str]) -> dict[str, Any]:
        record: dict[str, Any] = {"input_ids": pieces, "img_fname": image}
        if caption.text is not None:
            record["sent"] = caption.text
        if caption.fields is not None:
            record.update(caption.fields)
        for name, text in (caption.texts or {}).items():
            record[name] = self._tokenizer.encode(text) if isinstance(text, str) else self._tokenizer.encode_batch(text)
        return record

    def _packed(self, example: str, record: dict[str, Any]) -> bytes:
        try:
            packed: bytes = self._packer.pack(record)
        except UnicodeEncodeError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise BadInput(f"the fields of text {example!r} cannot be stored ({error}); expected numbers, strings, lists, maps") from None
        return packed

    def _write_columns(self, block: _Block, lengths: "Mapping[str, array[int]]") -> None:
        self._columns["ids"].write(b"".join(block.keys))
        self._columns["id_hashes"].write(array("Q", map(hash_key, block.keys)).tobytes())
        self._columns["id_lengths"].write(array("i", map(len, block.keys)).tobytes())
        self._columns["images"].write(block.image_numbers.tobytes())
        self._columns["texts"].write(block.texts.tobytes())
        self._columns["checksums"].write(block.checksums.tobytes())
        for name, column in lengths.items():
            self._columns[name].write(column.tobytes())
            self._id2len[name].write(zip(block.ids, column, strict=True))
        self._txt2img.write(zip(block.ids, block.images, strict=True))

    def _write_run(self) -> None:
        self._run.sort()
        path = self._work / f"run-{len(self.runs):05d}"
        with open(path, "wb") as file:
            for start in range(0, len(self._run), BATCH):
                file.write(b"".join(map(self._run_packer.pack, self._run[start : start + BATCH])))
        self.runs.append(path)
        self._run.clear()
        self._run_bytes = 0

    def close(self) -> None:
        """Write what waits; the runs can then be merged and the index written."""
        if self._run:
            self._write_run()
        for column in self._columns.values():
            column.close()
        self.images.close()
        for table in (*self._id2len.values(), self._txt2img):
            table.close()

    def duplicates(self) -> int:
        """How many texts were there before, word for word, about the same images."""
        texts = np.fromfile(self._work / "texts", np.int64)
        texts.sort()
        return int((texts[1:] == texts[:-1]).sum())


class JsonObject:
    """A JSON object written bit by bit."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed in close()
        self._separator = b"{"

    def write(self, items: Iterable[tuple[str, Any]]) -> None:
        """Add entries, (name, value) each."""
        text = orjson.dumps(dict(items))[1:-1]
        if text:
            self._file.write(self._separator)
            self._file.write(text)
            self._separator = b",\n"

    def close(self) -> None:
        """End the object, and have the disk confirm it."""
        self._file.write(b"{}" if self._separator == b"{" else b"}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
