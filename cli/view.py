"""`uniter-view DB... --images photos/ --out report/`: a page to look at. `uniter-view RUN... --out report/`: curves of training runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from uniter.cli.common import common_options, print_summary
from uniter.datasets.errors import BadInput
from uniter.datasets.report import write_region_report, write_runs_report
from uniter.datasets.text_db import TextDB
from uniter.datasets.tokenizer import Tokenizer

EXAMPLES = """\b
Examples:
  uniter-view out.lmdb --images photos/ --out report/
  uniter-view out.lmdb --images photos/ --text captions.db --out report/ --limit 500
  uniter-view out.lmdb --images photos/ --out report/ --key COCO_train2014_000000084002
  uniter-view run-a/ run-b/ --out curves/

Open report/index.html in any browser; it needs no server and no network.
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("sources", nargs=-1, required=True, metavar="DB|RUN...")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER",
              help="The report's folder; an earlier report there is replaced.")  # fmt: skip
@click.option("--images", "photographs", type=click.Path(path_type=Path), metavar="FOLDER",
              help="The photographs (any depth); without them boxes are drawn on empty canvases.")  # fmt: skip
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), metavar="DB",
              help="Text databases whose captions stand below the pictures; may be repeated.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=0), default=100, show_default=True,
              help="How many pictures, evenly spaced over the database; 0 draws all.")  # fmt: skip
@click.option("--key", "keys", multiple=True, metavar="KEY", help="Draw this image; may be repeated, overrules --limit.")
@click.option("--boxes", "most_boxes", type=click.IntRange(min=1), metavar="N",
              help="Draw at most so many boxes a picture, the most confident ones.  [default: all]")  # fmt: skip
@click.option("--allow-partial", is_flag=True, help="Also look at a database that is not finished.")
@common_options
def main(
    sources: tuple[str, ...],
    out: Path,
    photographs: Path | None,
    texts: tuple[Path, ...],
    limit: int,
    keys: tuple[str, ...],
    most_boxes: int | None,
    allow_partial: bool,
    as_json: bool,
) -> None:
    """A page to look at: regions on their photographs, captions, histograms, failures; for run directories, curves.

    DB is a region database of any kind (ours, published, several); RUN is a directory of uniter-train.
    """
    runs = [source for source in sources if (Path(source) / "log.jsonl").is_file()]
    if runs and len(runs) < len(sources):
        other = next(source for source in sources if source not in runs)
        raise click.UsageError(f"{runs[0]} is a run directory and {other} is none; look at runs and databases one after the other")
    if runs:
        from uniter.model.train.log import read_log

        names = _short_names(runs)
        summary = write_runs_report({name: read_log(Path(run)) for name, run in zip(names, runs, strict=True)}, out).as_dict()
    else:
        captions = _captions(texts) if texts else None
        summary = write_region_report(
            sources,
            out,
            photographs=photographs,
            captions=captions,
            limit=limit,
            keys=keys,
            most_boxes=most_boxes,
            allow_partial=allow_partial,
        ).as_dict()
    print_summary(summary, as_json=as_json, title=f"open {summary['page']}")


def _short_names(runs: Sequence[str]) -> list[str]:
    """The folders' names, or the whole paths where two runs have the same name."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _captions(paths: Sequence[Path]) -> Callable[[str], list[str]]:
    """From an image key to its captions in all of the text databases; words are put together again where only word pieces are kept."""
    databases = [TextDB(path) for path in paths]
    vocabularies: dict[Path, Tokenizer | None] = {}

    def of_image(key: str) -> list[str]:
        found: list[str] = []
        for database in databases:
            images = database.images()
            for number in images.get(key) or ():
                record = database.record(number)
                text = record.get("sent")
                found.append(text if isinstance(text, str) else _words(database, record.get("input_ids", []), vocabularies))
        return found

    return of_image


def _words(database: TextDB, ids: Sequence[int], vocabularies: dict[Path, Tokenizer | None]) -> str:
    if database.path not in vocabularies:
        beside = database.path / "vocab.txt"
        try:
            vocabularies[database.path] = Tokenizer.load(beside if beside.is_file() else database.tokenizer_name or "bert-base-cased")
        except BadInput:
            vocabularies[database.path] = None
    tokenizer = vocabularies[database.path]
    if tokenizer is None:
        return f"{len(ids)} word pieces of {database.tokenizer_name}, whose vocabulary is not at hand"
    return " ".join(tokenizer.tokens(ids)).replace(" ##", "")


if __name__ == "__main__":
    main()
