"""uniter-build-db: captions (or a task's annotations) to a text database; `uniter-build-db exclude`: lists of images not to see."""

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from uniter.cli.common import SKIPPED_UNDER_STRICT, common_options, print_summary
from uniter.datasets.errors import BadInput, unknown_name
from uniter.datasets.image_db.database import ImageDB, match_image_key, open_image_dbs
from uniter.datasets.image_db.keys import key_maker, last_number
from uniter.datasets.storage.claims import Source, refuse_source_inside, source_names
from uniter.datasets.storage.contents import BESIDE
from uniter.datasets.storage.files import expand_braces, write_json
from uniter.datasets.storage.streams import first_character, json_pairs
from uniter.datasets.text_db.annotations.table import ANNOTATIONS, Annotations
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.building.folder import BuildReport
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.table import CAPTIONS, detect
from uniter.datasets.text_db.captions.visual_genome import image_tables
from uniter.datasets.text_db.exclusions import LISTS, PARTS, Exclusion, exclusion_lists, forbidden_coco, kind_of_annotations
from uniter.datasets.text_db.tokenizer import Tokenizer

# How UNITER's published region databases call the images of a source (facts 1.4), tried after the rules of the contract.
PUBLISHED_KEYS = {
    "karpathy": ("coco_{parent}_{id:012d}.npz", "flickr30k_{id:012d}.npz", "flickr30k_{stem}.npz"),
    "vg": ("vg_{stem}.npz", "vg_{id:012d}.npz"),
}
PARTS_BY_LISTS = ("coco", "vg")  # sources whose parts the --exclude lists know


class BuildCommand(click.Command):
    """A command whose first word may be that of another one."""

    @property
    def commands(self) -> dict[str, click.Command]:
        return {"exclude": exclude}

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0] in self.commands:
            return self.commands[words[0]].main(words[1:], f"{prog_name or 'uniter-build-db'} {words[0]}", **extra)
        return super().main(words, prog_name, **extra)


@click.command(cls=BuildCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("captions")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option(
    "--task", default="captions", show_default=True, metavar="NAME", help="captions, or a down-stream task whose annotations are read."
)
@click.option("--format", "format_name", metavar="NAME", help=f"{', '.join(CAPTIONS)}.  [default: by content]")
@click.option(
    "--tokenizer",
    default="bert-base-cased",
    show_default=True,
    metavar="NAME|PATH|train:SIZE",
    help="A vocabulary file, a folder, a hub name, or learn SIZE word pieces from these captions.",
)
@click.option("--images", multiple=True, metavar="DB", help="Region databases that the images must be in; repeatable.")
@click.option("--split", metavar="PART", help="Which part, where the source has parts; several with commas.  [default: all]")
@click.option("--exclude", "lists", multiple=True, type=click.Path(path_type=Path), metavar="LIST", help="Images not to see; repeatable.")
@click.option("--key", metavar="TEMPLATE", help="Images' keys: stem, path, or of {stem} {name} {parent} {path} {id:012d}.  [default: stem]")
@click.option(
    "--join",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="TABLE",
    help="Companion files: what became of urls (img2dataset's output) for cc and sbu; image_data.json for vg; a task's further files.",
)
@click.option("--label-separator", metavar="TEXT", help="Of classify and vqa: what stands between several labels or answers of a row.")
@click.option("--score", is_flag=True, default=None, help="Of classify: labels are numbers to be predicted as such, no classes.")
@click.option("--answers-more-than", type=click.IntRange(min=0), metavar="N", help="Of vqa: learn the answers of more than N questions.  "
              "[default: 8 of VQA's annotations, 0 of a table of your own]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Build anew beside what OUT holds, and take its place when all is done.")
@click.option("--strict", is_flag=True, help="Exit with 3 if a text was empty or without an image.")
@common_options
def main(
    captions: str,
    out: Path | None,
    task: str,
    format_name: str | None,
    tokenizer: str,
    images: tuple[str, ...],
    split: str | None,
    lists: tuple[Path, ...],
    key: str | None,
    join: tuple[Path, ...],
    label_separator: str | None,
    score: bool | None,
    answers_more_than: int | None,
    overwrite: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Make a text database of CAPTIONS in the folder OUT (by default beside it: captions.json -> captions.db).

    CAPTIONS: COCO captions, Karpathy's dataset_*.json, Visual Genome's region_descriptions.json, Conceptual Captions' TSV, SBU,
    img2dataset's output, Flickr's .token files, JSONL, CSV or parquet with an image and a caption column, what Hugging Face's `datasets`
    saved to disk, or a folder of name.jpg with name.txt. Several files as 'captions_{train,val}2014.json' or 'data/*.parquet'.

    \b
    Examples:
      uniter-build-db captions.json
      uniter-build-db pairs.csv --task classify --images out.lmdb
      uniter-build-db dataset_coco.json train.db --split train,restval --images out.lmdb --exclude excluded.json
      uniter-build-db exclude --help

    The same command again finishes what was killed, and does nothing where all is done.
    """
    start = time.monotonic()
    options = {"label_separator": label_separator, "score": score, "answers_more_than": answers_more_than}
    source = _source(task, format_name, expand(captions), split=split, join=join, lists=lists, options=options)
    folder = out or _default_out(source.paths[0])
    regions = _regions(images, folder)
    pieces = _tokenizer(tokenizer, source).with_words(source.kind.added_words)
    report = build_text_db(
        source.captions(),
        folder,
        tokenizer=pieces,
        settings=source.settings(task),
        sources={**source.contents(), **_region_content(images, regions)},
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
    summary = _summary(report, folder, source.format, pieces.name, time.monotonic() - start)
    title = "Already complete; nothing was done." if report.already_complete else "Text database made."
    print_summary(summary, as_json=as_json, title=title)
    if strict and report.counts.get("empty", 0) + report.counts.get("without_image", 0):
        sys.exit(SKIPPED_UNDER_STRICT)


def _summary(report: BuildReport, folder: Path, form: str, tokenizer: str, seconds: float) -> dict[str, Any]:
    summary = {"out": str(folder), "format": form, "tokenizer": tokenizer, **report.as_dict(), "seconds": round(seconds, 3)}
    if not report.already_complete:
        summary["texts_per_second"] = round(report.counts["read"] / max(seconds, 1e-9))
    return summary


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--coco", multiple=True, type=click.Path(path_type=Path), metavar="JSON", help="instances_ or captions_{train,val}2014.json.")
@click.option(
    "--karpathy", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="dataset_coco.json, or karpathy_*_images.txt."
)
@click.option("--refcoco", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="refs(unc).p of RefCOCO or RefCOCO+.")
@click.option("--refcocog", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="refs(umd).p of RefCOCOg.")
@click.option(
    "--flickr30k", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="train/val/test.txt, or dataset_flickr30k.json."
)
@click.option("--vg", type=click.Path(path_type=Path), metavar="JSON", help="Visual Genome's image_data.json.")
@click.option("--out", default="excluded.json", show_default=True, type=click.Path(path_type=Path, dir_okay=False), help="The lists.")
@common_options
def exclude(
    files: tuple[Path, ...],
    coco: tuple[Path, ...],
    karpathy: tuple[Path, ...],
    refcoco: tuple[Path, ...],
    refcocog: tuple[Path, ...],
    flickr30k: tuple[Path, ...],
    vg: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Make the lists of images that pre-training must not see, from the annotation files of the down-stream tasks.

    FILES are told apart by what they hold; the options say what a file is. Karpathy's validation images are listed as the validation part,
    not as excluded. Give what you have; a list without its files is empty, and the report says so.

    \b
    Example:
      uniter-build-db exclude instances_{train,val}2014.json dataset_coco.json \\
        'refs(unc).p' 'refs(umd).p' flickr30k/*.txt image_data.json --out excluded.json
    """
    given = {"coco": [*coco], "karpathy": [*karpathy], "refcoco": [*refcoco], "refcocog": [*refcocog], "flickr30k": [*flickr30k]}
    given["visual_genome"] = [vg] if vg is not None else []
    for path in files:
        given[kind_of_annotations(path)].append(path)
    if not any(given[kind] for kind in ("karpathy", "refcoco", "refcocog", "flickr30k")):
        raise click.UsageError("give at least one of Karpathy's splits, RefCOCO's or RefCOCOg's refs, and Flickr30k's photo ids")
    genome = given.pop("visual_genome")
    if len(genome) > 1:
        raise click.UsageError(f"give one image_data.json of Visual Genome, not {len(genome)}")
    _refuse_to_replace(out, [*chain.from_iterable(given.values()), *genome])  # at once: reading COCO takes its time
    lists = exclusion_lists(
        coco=given["coco"],
        karpathy=given["karpathy"],
        refcoco=given["refcoco"],
        refcocog=given["refcocog"],
        flickr30k=given["flickr30k"],
        visual_genome=genome[0] if genome else None,
    )
    write_json(out, lists)
    summary: dict[str, Any] = {"out": str(out), **{name: len(values) for name, values in lists.items()}}
    summary["forbidden_coco_images"] = len(forbidden_coco(lists))
    summary["from"] = {kind: [path.name for path in paths] for kind, paths in {**given, "visual_genome": genome}.items() if paths}
    print_summary(summary, as_json=as_json, title="Images that pre-training must not see.")
    if not given["coco"]:
        click.echo(
            "without COCO's own files the Flickr photos of COCO images are unknown; flickr30k_coco_iids and some url ids are missing",
            err=True,
        )


def _refuse_to_replace(out: Path, sources: Sequence[Path]) -> None:
    """BadInput if the lists would take the place of something else than such lists."""
    if out.resolve() in {path.resolve() for path in sources}:
        raise BadInput(f"{out} is one of the files that the lists are made from, and would be written over; choose another --out")
    if out.exists() and not (first_character(out) == "{" and set(LISTS) & {name for name, _ in islice(json_pairs(out), len(LISTS))}):
        raise BadInput(f"{out} is there already and holds no lists of `uniter-build-db exclude`; choose another --out")


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
            raise BadInput(unknown_name("caption format", name, CAPTIONS))
        row = Annotations(read=CAPTIONS[name], companions="", published_keys=PUBLISHED_KEYS.get(name, ()))
        return name, replace(row, beside=image_tables) if name == "vg" else row
    if task not in ANNOTATIONS:
        raise BadInput(unknown_name("task", task, ("captions", *ANNOTATIONS)))
    if format_name is not None:
        raise BadInput(f"--format chooses among caption formats; with --task {task} leave it away")
    return task, ANNOTATIONS[task]


def _parts(kind: str, split: str | None, exclusion: Exclusion | None) -> tuple[str | None, str | None]:
    """(the part the reader is asked for, the part that the lists decide)."""
    if split is None or kind not in PARTS_BY_LISTS or exclusion is None or not exclusion.knows_parts:
        return split, None
    if split not in PARTS:
        raise BadInput(f"{unknown_name('split', split, PARTS)}: Karpathy's validation images, or all others")
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
        raise BadInput(f"--tokenizer {name!r}: expected train:SIZE with a whole number of word pieces, e.g. train:8000")
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


if __name__ == "__main__":
    main()
