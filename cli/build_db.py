"""uniter-build-db: captions (or a task's annotations) to a text database; `uniter-build-db exclude`: lists of images not to see."""

import sys
import time
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from uniter.cli.common import SKIPPED_UNDER_STRICT, common_options, print_summary
from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import write_json
from uniter.datasets.storage.streams import first_character, json_pairs
from uniter.datasets.text_db.building.folder import BuildReport
from uniter.datasets.text_db.building.from_files import build
from uniter.datasets.text_db.captions.table import CAPTIONS
from uniter.datasets.text_db.exclusions import LISTS, exclusion_lists, forbidden_coco, kind_of_annotations


class BuildCommand(click.Command):
    """A command whose first word may be that of another one."""

    @property
    def commands(self) -> dict[str, click.Command]:
        """The commands that may be the first word."""
        return {"exclude": exclude}

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run the command that the first word names, or else this one."""
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
    built = build(
        captions,
        out,
        task=task,
        form=format_name,
        tokenizer=tokenizer,
        images=images,
        split=split,
        exclude=lists,
        key=key,
        join=join,
        label_separator=label_separator,
        score=score,
        answers_more_than=answers_more_than,
        overwrite=overwrite,
    )
    report = built.report
    summary = _summary(report, built.path, built.form, built.tokenizer, time.monotonic() - start)
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


if __name__ == "__main__":
    main()
