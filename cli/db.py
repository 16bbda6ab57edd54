"""uniter-db: look at, check, convert, merge and split databases."""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from uniter.cli.cache import cache_command
from uniter.cli.common import FAILED, SKIPPED_UNDER_STRICT, common_options, print_summary, version
from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.database import open_image_dbs
from uniter.datasets.image_db.formats.records import Selection
from uniter.datasets.image_db.formats.table import FORMATS, format_named, listed
from uniter.datasets.maintenance.check import check_coverage, check_database
from uniter.datasets.maintenance.check_photographs import PhotographReport, check_photographs, key_rule_of
from uniter.datasets.maintenance.check_report import SHOWN, CheckReport
from uniter.datasets.maintenance.convert import ConvertReport, convert
from uniter.datasets.maintenance.convert_texts import convert_texts, holds_texts
from uniter.datasets.maintenance.describe import describe
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.maintenance.merge import merge
from uniter.datasets.maintenance.repair import repair
from uniter.datasets.maintenance.split import split
from uniter.datasets.text_db import TextDB


class FormatName(click.Choice[str]):
    """A name in `FORMATS`, hyphens and underscores alike."""

    def __init__(self) -> None:
        super().__init__(list(FORMATS))

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What stands for the value in the help: thirty names would not fit."""
        return "FORMAT"  # there are thirty; `--list` shows them

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The table's spelling of a name, or a usage error with near ones."""
        try:
            return format_named(value)
        except BadInput as error:
            self.fail(str(error), param, ctx)


HELP = {"help_option_names": ["-h", "--help"]}
DATABASE = click.Path(path_type=Path)


@click.group(context_settings=HELP)
@click.version_option(version(), "--version", prog_name="uniter-toolkit")
def main() -> None:
    """Look at, check, convert, merge and split region and text databases.

    \b
    Example:
      uniter-db info out.lmdb captions.db
      uniter-db check out.lmdb captions.db
      uniter-db convert train2014_obj36.tsv coco.lmdb
    """


@main.command(context_settings=HELP)
@click.argument("databases", metavar="DB...", nargs=-1, required=True, type=DATABASE)
@common_options
def info(databases: Sequence[Path], as_json: bool) -> None:
    """Tell what databases are and hold: counts, widths, detector, size on disk. Unfinished and damaged ones too; of damaged ones, with
    exit code 1.

    \b
    Example:
      uniter-db info out.lmdb captions.db
    """
    told = [describe(path) for path in databases]
    if as_json:
        print_summary({"databases": told}, as_json=True, title="")
    for one in () if as_json else told:
        print_summary({name: value for name, value in one.items() if name != "path"}, as_json=False, title=one["path"])
    if any("error" in one for one in told):
        sys.exit(FAILED)


@main.command(context_settings=HELP)
@click.argument("databases", metavar="DB...", nargs=-1, required=True, type=DATABASE)
@click.option("--images", "photographs", metavar="IMAGES",
              help="Also read the photographs again (named as for uniter-extract) and say which have changed.")  # fmt: skip
@click.option("--key", metavar="RULE", help="What --images are called in DB, as for uniter-extract.  [default: as DB says]")
@click.option("--repair", "repaired", metavar="OUT", type=DATABASE, help="Write what is good of the one DB to a new database.")
@click.option("--overwrite", is_flag=True, help="Replace what is at the OUT of --repair.")
@common_options
def check(
    databases: Sequence[Path], photographs: str | None, key: str | None, repaired: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Read databases from end to end and say what is damaged, what looks wrong and what is still good.

    Verified are the file's pages, every record's checksum and its numbers (boxes inside the image, probabilities that sum to 1,
    finite features), the side files, and, where texts and regions are given together, that they fit; with --images also that the
    photographs are, byte for byte, those that the regions were extracted from. Exit code 1 if anything is wrong;
    photographs that are gone are told, and are no fault.

    \b
    Example:
      uniter-db check out.lmdb captions.db
      uniter-db check out.lmdb --images photos/
      uniter-db check broken.lmdb --repair good.lmdb
    """
    if repaired is not None and len(databases) != 1:
        raise click.UsageError("--repair takes one database")
    if overwrite and repaired is None:
        raise click.UsageError("--overwrite is about the OUT of --repair, which was not given")
    if repaired is not None and photographs is not None:
        raise click.UsageError("--images compares the photographs of DB, and --repair writes a new database; run one after the other")
    if key is not None and photographs is None:
        raise click.UsageError("--key is about --images, which was not given")
    summary: dict[str, Any] = {}
    reports: list[CheckReport] = []
    if repaired is not None:
        reports.append(CheckReport(str(databases[0])))
        summary["repaired"] = repair(databases[0], repaired, reports[0], overwrite=overwrite)
    else:
        reports = [check_database(path) for path in databases]
    summary["databases"] = [report.as_dict() for report in reports]
    wrong = any(report.problems for report in reports)
    coverage = _coverage(databases) if repaired is None and len(databases) > 1 else None
    if coverage is not None:
        summary["coverage"] = coverage
        wrong = wrong or bool(coverage.get("error")) or coverage.get("texts") != coverage.get("texts_with_image")
    if photographs is not None:
        compared = _compare_photographs(databases, photographs, key)
        summary["photographs"] = asdict(compared)
        wrong = wrong or compared.wrong
    summary["ok"] = not wrong
    if as_json:
        print_summary(summary, as_json=True, title="")
    else:
        _print_check(reports, summary)
    if wrong:
        sys.exit(FAILED)


def _compare_photographs(databases: Sequence[Path], photographs: str, key: str | None) -> PhotographReport:
    """Read the photographs of region databases again."""
    from uniter.extract.images import list_images, read_bytes

    regions = [path for path in databases if not database_kind(path).endswith("text")]
    if not regions:
        raise click.UsageError("--images is about region databases, and none was named")
    listed = list_images(photographs, key=key or key_rule_of(regions))
    items = (item for number in range(listed.units) for item in listed.unit(number))
    found = ((item.key, item.path, functools.partial(read_bytes, item, max_pixels=sys.maxsize)) for item in items)
    return check_photographs(regions, found, total=listed.images)


def _coverage(databases: Sequence[Path]) -> dict[str, Any] | None:
    """How the texts among the databases fit the regions among them; None if one of the two is not there."""
    texts = [path for path in databases if database_kind(path).endswith("text")]
    images = [path for path in databases if path not in texts]
    if not texts or not images:
        return None
    try:
        opened = [TextDB(path, allow_partial=True) for path in texts]
        return asdict(check_coverage(opened, open_image_dbs(images, allow_partial=True)))
    except UniterError as error:
        return {"error": str(error)}


def _print_check(reports: Sequence[CheckReport], summary: dict[str, Any]) -> None:
    for report in reports:
        shown: dict[str, Any] = {"kind": report.kind, "records": report.records, "good": report.good}
        shown["problems"] = dict(report.problems) or "none"
        print_summary(shown, as_json=False, title=report.path)
        for sentence in report.examples:
            click.echo(f"  ! {sentence}")
        if sum(report.problems.values()) > len(report.examples):
            click.echo(f"  ! ... and {sum(report.problems.values()) - len(report.examples):,} more")
        for note in report.notes:
            click.echo(f"  - {note}")
    for name in ("coverage", "repaired", "photographs"):
        if name in summary:
            print_summary({what: value for what, value in summary[name].items() if not what.endswith("_names")}, as_json=False, title=name)
    for what in ("changed", "unreadable"):
        named = summary.get("photographs", {}).get(f"{what}_names", ())
        for name in named[:SHOWN]:
            click.echo(f"  ! {what}: {name}")
        if len(named) > SHOWN:
            click.echo(f"  ! ... and {len(named) - SHOWN:,} more (--json names all)")
    if summary.get("photographs", {}).get("unknown"):
        click.echo("  - unknown: an older version, or another program, did not note what it read")


@main.command("convert", context_settings=HELP)
@click.argument("source", metavar="IN", type=DATABASE, required=False)
@click.argument("out", metavar="OUT", type=DATABASE, required=False)
@click.option("--to", default="lmdb", show_default=True, type=FormatName(), help="The format to write.")
@click.option("--from", "source_format", type=FormatName(), help="The format of IN.  [default: recognised by content]")
@click.option("--list", "shows_formats", is_flag=True, help="Show all formats: what each holds, lacks, rounds and needs.")
@click.option("--images", type=click.Path(file_okay=False, path_type=Path), help="A folder of the pictures: their sizes, where needed.")
@click.option("--key", metavar="RULE", help="What images are called in OUT, from their keys: '{id}' is the number in them.")
@click.option("--captions", metavar="FILE|TEXTDB", type=DATABASE, help="Captions of the images, for formats that hold them.")
@click.option("--split", metavar="NAME", help="The part of the data that all are of.  [default: as their keys say]")
@click.option("--class-names", metavar="FILE", type=DATABASE, help="The names of IN's classes, one a line, where it numbers them only.")
@click.option("--conf-threshold", default=0.2, show_default=True, help="Of candidates keep those above it; -1: the first --num-boxes.")
@click.option("--min-boxes", default=10, show_default=True, type=click.IntRange(0), help="But at least so many.")
@click.option("--max-boxes", default=100, show_default=True, type=click.IntRange(1), help="And at most so many.")
@click.option("--num-boxes", default=36, show_default=True, type=click.IntRange(1), help="How many with --conf-threshold -1.")
@click.option("--keep-all", is_flag=True, help="Keep every candidate.")
@click.option("--overwrite", is_flag=True, help="Replace what is at OUT.")
@click.option("--strict", is_flag=True, help="Exit code 3 if an image was skipped.")
@common_options
def convert_command(
    source: Path | None,
    out: Path | None,
    to: str,
    source_format: str | None,
    shows_formats: bool,
    images: Path | None,
    key: str | None,
    captions: Path | None,
    split: str | None,
    class_names: Path | None,
    conf_threshold: float,
    min_boxes: int,
    max_boxes: int,
    num_boxes: int,
    keep_all: bool,
    overwrite: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Convert region features IN to OUT. IN's format is recognised; OUT is a region database unless --to says otherwise.

    A text database IN becomes UNITER's (--to uniter, whose keys fit regions converted so) or a table (--to parquet).

    The thresholds count for sources that hold candidates (docker's .npz folders, UNITER's `all`); other sources are kept whole.
    What the target lacks (soft labels, classes, confidences) is said in the summary. Broken images are skipped and listed.

    \b
    Example:
      uniter-db convert train2014_obj36.tsv coco.lmdb
      uniter-db convert img_db/coco_train2014 coco.lmdb
      uniter-db convert out.lmdb out.tsv --to lxmert-tsv
      uniter-db convert out.lmdb m2/ --to m2 --key '{id}'
      uniter-db convert --list
      uniter-db convert captions.db txt_db/captions.db --to uniter
    """
    if shows_formats:
        _print_formats(source, as_json=as_json)
        return
    if source is None or out is None:
        raise click.UsageError("expected IN and OUT, or --list")
    given = click.get_current_context().get_parameter_source
    if holds_texts(source):
        _refuse_about_regions()
        _print_written(asdict(convert_texts(source, out, to=to, overwrite=overwrite)), as_json=as_json, out=out)
        return
    named = {name: given(name) is ParameterSource.COMMANDLINE for name in ("conf_threshold", "min_boxes", "max_boxes", "num_boxes")}
    idle = ["num_boxes"] if conf_threshold != -1 else ["min_boxes", "max_boxes"]
    if pointless := [name for name in (named if keep_all else idle) if named[name]]:
        reason = "--keep-all keeps all" if keep_all else f"--conf-threshold is {conf_threshold:g}"
        raise click.UsageError(f"--{pointless[0].replace('_', '-')} has no meaning here, since {reason}")
    threshold = -1 if conf_threshold == -1 else conf_threshold
    selection = Selection(threshold, min_boxes, max_boxes, num_boxes, keep_all)
    report = convert(
        source,
        out,
        to=to,
        source_format=source_format,
        selection=selection,
        images=images,
        key=key,
        captions=captions,
        split=split,
        class_names=class_names,
        overwrite=overwrite,
    )
    _print_converted(report, as_json=as_json, out=out)
    if report.skipped and strict:
        sys.exit(SKIPPED_UNDER_STRICT)


def _print_converted(report: ConvertReport, *, as_json: bool, out: Path) -> None:
    """What was converted, and the first images that were not."""
    for row in report.skipped[:5]:
        click.echo(f"skipped: {row['error']}", err=True)
    if len(report.skipped) > 5:
        click.echo(f"skipped: ... and {len(report.skipped) - 5:,} more", err=True)
    summary = asdict(report)
    if not as_json:
        summary["skipped"] = len(report.skipped)
        if not report.said:
            del summary["said"]
    _print_written(summary, as_json=as_json, out=out)


def _print_formats(source: Path | None, *, as_json: bool) -> None:
    """The table of the formats."""
    if source is not None:
        raise click.UsageError("--list shows the formats and converts nothing")
    if as_json:
        rows = [{"format": name, "means": form.means, "holds": form.holds, "needs": form.needs} for name, form in FORMATS.items()]
        print_summary({"formats": rows}, as_json=True, title="")
        return
    click.echo(listed())


def _refuse_about_regions() -> None:
    """UsageError for options that say nothing about texts."""
    context = click.get_current_context()
    about_both = ("source", "out", "to", "overwrite", "as_json")
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    named = [name for name in given if name not in about_both]
    if named:
        option = next(parameter.opts[0] for parameter in context.command.params if parameter.name == named[0])
        raise click.UsageError(f"{option} is about regions, and IN is a text database; leave it out")


def _print_written(summary: Mapping[str, Any], *, as_json: bool, out: Path) -> None:
    """What was written, or that nothing had to be."""
    if summary["already_complete"]:
        click.echo(f"{out} was already complete, made from the same; nothing was done", err=True)
    shown = summary if as_json else {name: value for name, value in summary.items() if name != "already_complete"}
    print_summary(shown, as_json=as_json, title=str(out))


@main.command("merge", context_settings=HELP)
@click.argument("paths", metavar="IN... OUT", nargs=-1, required=True, type=DATABASE)
@click.option("--overwrite", is_flag=True, help="Replace what is at OUT.")
@common_options
def merge_command(paths: Sequence[Path], overwrite: bool, as_json: bool) -> None:
    """Put databases of one kind together into one file. The same image twice is fine if its regions are equal.

    \b
    Example:
      uniter-db merge part-0.lmdb part-1.lmdb whole.lmdb
    """
    if len(paths) < 2:
        raise click.UsageError("expected at least one IN and the OUT")
    for path in paths[:-1]:
        if not path.exists():
            raise BadInput(f"{path} does not exist")
    _print_written(merge(paths[:-1], paths[-1], overwrite=overwrite), as_json=as_json, out=paths[-1])


@main.command("split", context_settings=HELP)
@click.argument("source", metavar="IN", type=DATABASE)
@click.argument("out", type=DATABASE)
@click.option("--by", required=True, metavar="LIST|N", help="N equal parts, or a file of keys (a part's name may follow after a tab).")
@click.option("--overwrite", is_flag=True, help="Replace what is in OUT.")
@common_options
def split_command(source: Path, out: Path, by: str, overwrite: bool, as_json: bool) -> None:
    """Take a database apart into databases in the folder OUT, which reads as one database again.

    \b
    Example:
      uniter-db split out.lmdb parts/ --by 4
      uniter-db split out.lmdb parts/ --by val_keys.txt      # parts/listed and parts/rest
    """
    _print_written(split(source, out, by=by, overwrite=overwrite), as_json=as_json, out=out)


main.add_command(cache_command)


if __name__ == "__main__":
    main()
