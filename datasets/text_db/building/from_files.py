"""From the files of a caption set or a task, as their authors publish them, to a text database: what `uniter-build-db` calls.

What a reader would get wrong: one file can be read twice, for the word pieces that are learnt from it and for the texts, so a `_Source` is
asked for its captions and never holds them.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.image_db.database import ImageDB, match_image_key, open_image_dbs
from uniter.datasets.image_db.keys import key_maker, last_number
from uniter.datasets.storage.claims import Source, refuse_source_inside, source_names
from uniter.datasets.storage.contents import BESIDE
from uniter.datasets.storage.files import expand_braces
from uniter.datasets.text_db.annotations.table import ANNOTATIONS, Annotations
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.building.folder import BuildReport
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.table import CAPTIONS, detect
from uniter.datasets.text_db.captions.visual_genome import image_tables
from uniter.datasets.text_db.exclusions import PARTS, Exclusion
from uniter.datasets.text_db.tokenizer import Tokenizer

# How UNITER's published region databases call the images of a source (facts 1.4), tried after the rules of the contract.
PUBLISHED_KEYS = {
    "karpathy": ("coco_{parent}_{id:012d}.npz", "flickr30k_{id:012d}.npz", "flickr30k_{stem}.npz"),
    "vg": ("vg_{stem}.npz", "vg_{id:012d}.npz"),
}
PARTS_BY_LISTS = ("coco", "vg")  # sources whose parts the --exclude lists know


@dataclass(frozen=True)
class Built:
    """A text database that was made, or found complete.

    Attributes:
        path: its folder; `TextDB(path)` opens it.
        form: the caption format or the task that its files were read as.
        tokenizer: the name of its vocabulary.
        report: what was read, kept and left out.
    """

    path: Path
    form: str
    tokenizer: str
    report: BuildReport


def build(
    captions: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    task: str = "captions",
    form: str | None = None,
    tokenizer: str = "bert-base-cased",
    images: Sequence[str | os.PathLike[str]] = (),
    split: str | None = None,
    exclude: Sequence[Path] = (),
    key: str | None = None,
    join: Sequence[Path] = (),
    label_separator: str | None = None,
    score: bool | None = None,
    answers_more_than: int | None = None,
    overwrite: bool = False,
) -> Built:
    """Make a text database of the files of a caption set or a task; the same call again finishes what was killed, or finds it complete.

    Args:
        captions: a file or folder; several files with braces, `*` or `?`.
        out: the folder to make; None: beside the first file, `captions.json` -> `captions.db`.
        task: "captions", or a row of `ANNOTATIONS` ("vqa", "classify" ...).
        form: the caption format, a row of `CAPTIONS`; None: told by content.
        tokenizer: a vocabulary file, a folder, a hub name, or "train:SIZE" to learn so many word pieces from these captions.
        images: region databases that the images must be in; "one;other" are the two kinds of regions of VCR.
        split: the part, where the source has parts; several with commas.
        exclude: lists of images not to see.
        key: how an image's key is made from its name; None: looked up in `images`, or "stem".
        join: companion files, or a task's further ones.
        label_separator, score, answers_more_than: how a table of one's own is read, as the options of `uniter-build-db` say.
        overwrite: build anew beside what `out` holds, and take its place in the end.

    Raises:
        WrongUsage: no such task, format or part.
        BadInput, SettingsDiffer: as of `build_text_db`; or a file is not what it should be.
    """
    options = {"label_separator": label_separator, "score": score, "answers_more_than": answers_more_than}
    databases = [os.fspath(name) for name in images]
    source = _source(task, form, expand(os.fspath(captions)), split=split, join=tuple(join), lists=tuple(exclude), options=options)
    folder = Path(out) if out is not None else _default_out(source.paths[0])
    regions = _regions(databases, folder)
    pieces = _tokenizer(tokenizer, source).with_words(source.kind.added_words)
    report = build_text_db(
        source.captions(),
        folder,
        tokenizer=pieces,
        settings=source.settings(task),
        sources={**source.contents(), **_region_content(databases, regions)},
        images=_matcher(regions, key, source.kind.published_keys) if regions is not None else None,
        key=key,
        folders_tell_apart=source.kind.folders_tell_apart,
        source_counts=source.counts,
        lengths=source.kind.lengths,
        meta={"task": task, "annotations": [path.name for path in source.paths], "output": folder.name},
        side_files=source.side_files,
        may_lack_text=source.kind.may_lack_text,
        overwrite=overwrite,
    )
    return Built(folder, source.format, pieces.name, report)


def expand(pattern: str) -> list[Path]:
    """The files that a name with braces, `*` or `?` stands for, in order; a file that exists is itself."""
    if Path(pattern).exists():
        return [Path(pattern)]
    names = [Path(name) for name in expand_braces(pattern)]
    if not any(character in pattern for character in "*?["):
        return names
    found = [sorted(name.parent.glob(name.name)) for name in names]
    if not all(found):
        raise BadInput(f"nothing matches {pattern!r}; expected files or folders of captions")
    return list(chain.from_iterable(found))


def _default_out(path: Path) -> Path:
    name = path.resolve().name
    return path.parent / f"{name.split('.')[0] if path.is_file() else name}.db"


@dataclass(frozen=True)
class _Source:
    """What the texts are read from.

    Attributes:
        format: the name of the caption format, or the task.
        kind: its row of the table.
        read_split: the part that the reader is asked for; `part`: the one that the lists decide.
        options: what else the reader was told, as the user gave it.
        counts: what was passed over, by name, in the pass that is going on.
    """

    format: str
    kind: Annotations
    paths: list[Path]
    split: str | None
    read_split: str | None
    part: str | None
    join: tuple[Path, ...]
    exclusion: Exclusion | None
    options: Mapping[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def captions(self) -> Iterator[Caption]:
        """One pass over the texts that may be seen."""
        self.counts.clear()
        # Texts without ids are numbered in their file; several files must not number alike.
        prefixes = [
            {"row_prefix": f"{place}-"} if self.format in CAPTIONS and len(self.paths) > 1 else {} for place in range(len(self.paths))
        ]
        texts: Iterator[Caption] = chain.from_iterable(
            self.kind.read(path, split=self.read_split, join=self.join, counts=self.counts, **prefix)
            for path, prefix in zip(self.paths, prefixes, strict=True)
        )
        if self.exclusion is not None:
            texts = texts if self.part is None else _of_part(texts, self.part, self.exclusion, self.counts)
            texts = self.exclusion.leave_out(texts, self.counts)
        yield from texts

    def side_files(self) -> Mapping[str, Any]:
        return self.kind.side_files(self.paths, split=self.split, join=self.join)

    def settings(self, task: str) -> dict[str, Any]:
        """What decides the texts, but for the contents of files."""
        excluded = self.exclusion.hashes if self.exclusion is not None else {}
        settings = {"task": task, "source_format": self.format, "split": self.split, "exclude": excluded}
        return settings | ({"options": dict(self.options)} if self.options else {})

    def contents(self) -> dict[str, Source]:
        """The files, under the names by which the database remembers them."""
        contents: dict[str, Source] = {**source_names(self.paths, "captions")}
        if self.join:
            contents |= source_names(self.join, "join")
        beside = list(dict.fromkeys(chain.from_iterable(self.kind.beside(path, self.join) for path in self.paths)))
        if beside := [path for path in beside if path not in self.join]:
            contents |= source_names(beside, BESIDE)
        if self.exclusion is not None:
            together = hashlib.sha256("".join(sorted(self.exclusion.hashes.values())).encode()).hexdigest()
            contents["exclude"] = {"name": ", ".join(self.exclusion.hashes), "sha256": together}
        return contents


def _source(
    task: str,
    format_name: str | None,
    paths: list[Path],
    *,
    split: str | None,
    join: tuple[Path, ...],
    lists: tuple[Path, ...],
    options: Mapping[str, Any],
) -> _Source:
    name, kind = _reader(task, format_name, paths[0])
    options = {option: value for option, value in options.items() if value is not None}
    kind = kind.with_options(task, options, paths)
    exclusion = Exclusion(lists) if lists else None
    read_split, part = _parts(name, split, exclusion)
    if name == "vg" and exclusion is not None and exclusion.lists_coco and not all(image_tables(path, join) for path in paths):
        raise BadInput(
            "the --exclude lists are of COCO's images, and only image_data.json says which of Visual Genome's are these: "
            f"put it beside {paths[0]}, or name it with --join"
        )
    return _Source(name, kind, paths, split, read_split, part, join, exclusion, options)


def _reader(task: str, format_name: str | None, path: Path) -> tuple[str, Annotations]:
    """The format's name and its row; down-stream tasks are formats of their own."""
    if task == "captions":
        if not path.exists():
            raise BadInput(f"{path} is not there; expected a file or folder of captions")
        name = format_name or detect(path)
        if name not in CAPTIONS:
            raise WrongUsage(unknown_name("caption format", name, CAPTIONS))
        row = Annotations(read=CAPTIONS[name], companions="", published_keys=PUBLISHED_KEYS.get(name, ()))
        return name, replace(row, beside=image_tables) if name == "vg" else row
    if task not in ANNOTATIONS:
        raise WrongUsage(unknown_name("task", task, ("captions", *ANNOTATIONS)))
    if format_name is not None:
        raise WrongUsage(f"--format chooses among caption formats; with --task {task} leave it away")
    return task, ANNOTATIONS[task]


def _parts(kind: str, split: str | None, exclusion: Exclusion | None) -> tuple[str | None, str | None]:
    """(the part the reader is asked for, the part that the lists decide)."""
    if split is None or kind not in PARTS_BY_LISTS or exclusion is None or not exclusion.knows_parts:
        return split, None
    if split not in PARTS:
        raise WrongUsage(f"{unknown_name('split', split, PARTS)}: Karpathy's validation images, or all others")
    return None, split


def _of_part(texts: Iterator[Caption], part: str, exclusion: Exclusion, counts: Counter[str]) -> Iterator[Caption]:
    for caption in texts:
        if exclusion.part(caption) == part:
            yield caption
        else:
            counts["texts_of_other_parts"] += 1


def _tokenizer(name: str, source: _Source) -> Tokenizer:
    if not name.startswith("train:"):
        return Tokenizer.load(name)
    size = name.removeprefix("train:")
    if not (size.isascii() and size.isdigit() and len(size) <= 9) or int(size) < 1:
        raise WrongUsage(f"--tokenizer {name!r}: expected train:SIZE with a whole number of word pieces, e.g. train:8000")
    return Tokenizer.learn((caption.text or "" for caption in source.captions()), size=int(size))


def _regions(images: Sequence[str], out: Path) -> ImageDB | None:
    if not images:
        return None
    for name in images:
        for path in name.split(";"):  # ground truth and detected
            refuse_source_inside(out, Path(path))
    return open_image_dbs(list(images))


def _region_content(images: Sequence[str], regions: ImageDB | None) -> dict[str, Any]:
    """Region databases as a source: of them only the keys decide what is written."""
    if regions is None:
        return {}
    digest = hashlib.sha256()
    for key in regions.keys_list:
        digest.update(f"{key}\n".encode(errors="surrogatepass"))
    return {"images": {"name": ", ".join(Path(name).name for name in images), "images": len(regions), "index": digest.hexdigest()}}


def _matcher(databases: ImageDB, key: str | None, published: Sequence[str]) -> Callable[[str], tuple[str, str] | None]:
    make_key = key_maker(key) if key is not None else None
    published_makers = [key_maker(template) for template in published]

    def match(name: str) -> tuple[str, str] | None:
        if make_key is not None and (made := make_key(name)) in databases:
            return made, "template"
        found = match_image_key(databases, name) or match_published(name)
        # A name without folders has no path: what is left of it without its suffix is the stem.
        return (found[0], "stem") if found is not None and found[1] == "path" and "/" not in name else found

    def match_published(name: str) -> tuple[str, str] | None:
        stem = Path(name).stem
        made = [f"{stem.lower()}.npz"] if stem.startswith("COCO_") else []
        has_digits = last_number(stem) is not None
        made += [make(name) for make, template in zip(published_makers, published, strict=True) if has_digits or "{id" not in template]
        return next(((key, "published") for key in made if key in databases), None)

    return match
