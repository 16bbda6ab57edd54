"""`uniter-view DB... --images photos/ --out report/`: a page to look at. `uniter-view RUN... --out report/`: curves of training runs,
and with a region and a text database what the words of a pre-trained run look at, or what a fine-tuned one got right and wrong.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from uniter.cli.common import common_options, open_in_browser, print_summary
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.database import open_image_dbs
from uniter.datasets.runs.held_out import read_held_out
from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import BEST, CHECKPOINTS
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.view.class_report import write_class_report
from uniter.datasets.view.outcomes import HardExample, Outcomes
from uniter.datasets.view.region_report import write_region_report
from uniter.datasets.view.run_report import LookedAt, write_runs_report

log = logging.getLogger(__name__)

EXAMPLES = """\b
Examples:
  uniter-view out.lmdb --images photos/ --out report/
  uniter-view out.lmdb --images photos/ --text captions.db --out report/ --limit 500
  uniter-view out.lmdb --images photos/ --out report/ --key COCO_train2014_000000084002
  uniter-view out.lmdb --images photos/ --out dogs/ --class dog --open
  uniter-view run-a/ run-b/ --out curves/
  uniter-view detector/ --images photos/ --out training/
  uniter-view run/ out.lmdb --text captions.db --images photos/ --out looks/

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
@click.option("--key", "keys", multiple=True, metavar="KEY", help="Draw this image; may be repeated, overrules --limit and --pairs.")
@click.option("--boxes", "most_boxes", type=click.IntRange(min=1), metavar="N",
              help="Draw at most so many boxes a picture, the most confident ones.  [default: all]")  # fmt: skip
@click.option("--pairs", type=click.IntRange(min=1), default=8, show_default=True,
              help="With a RUN, a DB and --text: how many texts are looked at, or hard examples are shown.")  # fmt: skip
@click.option("--class", "class_name", metavar="NAME",
              help="All regions of this class instead, the surest first, on one page; at most --limit.")  # fmt: skip
@click.option("--allow-partial", is_flag=True, help="Also look at a database that is not finished.")
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
@common_options
def main(
    sources: tuple[str, ...],
    out: Path,
    photographs: Path | None,
    texts: tuple[Path, ...],
    limit: int,
    keys: tuple[str, ...],
    most_boxes: int | None,
    pairs: int,
    class_name: str | None,
    allow_partial: bool,
    opens: bool,
    as_json: bool,
) -> None:
    """A page to look at: regions on their photographs, captions, histograms, failures; for run directories, curves.

    DB is a region database of any kind (ours, published, several); RUN is a directory of uniter-train. One RUN with DB and --text
    also shows which regions each word attends to, and the transport plan; of a fine-tuned RUN what it got right and wrong; a detector's
    RUN with --images each class's average precision and the photographs held out on which it did worst.
    """
    runs = [source for source in sources if (Path(source) / "log.jsonl").is_file()]
    others = [source for source in sources if source not in runs]
    held_out = {run: found for run in runs if (found := read_held_out(Path(run))) is not None}
    of_runs = "looks" if others else "trainings" if held_out else "runs"
    _refuse_idle_options(of_runs if runs else "regions" if class_name is None else "class")
    if runs:
        if others and (len(runs) > 1 or not texts):
            raise click.UsageError(f"with {others[0]}, give one run and --text: its words are looked at over those regions")
        if len(texts) > 1:
            raise click.UsageError(f"only one --text is looked at: {texts[0]} or {texts[1]}?")
        names = _short_names(runs)
        logs = {name: read_log(Path(run)) for name, run in zip(names, runs, strict=True)}
        database = open_image_dbs(list(others), allow_partial=allow_partial) if others else None
        looks: Iterator[LookedAt] | tuple[()] = ()
        outcomes = None
        if database is not None:
            outcomes = _outcomes(runs[0], others, texts[0], pairs, keys)
            looks = () if outcomes is not None else _looks(Path(runs[0]), database, texts, pairs, keys)
        class_names = database.class_names if database is not None else None
        summary = write_runs_report(
            logs,
            out,
            looks=looks,
            outcomes=outcomes,
            held_out={name: held_out[run] for name, run in zip(names, runs, strict=True) if run in held_out},
            photographs=photographs,
            class_names=class_names,
            sources=[*sources, *texts],
        ).as_dict()
    elif class_name is not None:
        summary = write_class_report(sources, out, class_name, photographs=photographs, limit=limit, allow_partial=allow_partial).as_dict()
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
    if opens:
        open_in_browser(Path(summary["page"]))


# What is drawn -> the options that make no difference to it.
_IDLE = {
    "regions": ("pairs",),
    "class": ("texts", "keys", "most_boxes", "pairs"),
    "runs": ("photographs", "texts", "limit", "keys", "most_boxes", "pairs", "class_name", "allow_partial"),
    "looks": ("limit", "most_boxes", "class_name"),
    "trainings": ("texts", "limit", "keys", "most_boxes", "pairs", "class_name", "allow_partial"),
}
_MEANS = {
    "regions": "the page of region databases",
    "class": "the page of one class",
    "runs": "a page of runs alone",
    "looks": "the page of what a run looks at",
    "trainings": "the page of a detector's training",
}


def _refuse_idle_options(what: str) -> None:
    """An option that would change nothing is an error: it was given for something else."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in _IDLE[what] and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} makes no difference to {_MEANS[what]}; leave it out")


def _short_names(runs: Sequence[str]) -> list[str]:
    """The folders' names, or the whole paths where two runs have the same name."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _looks(run: Path, regions: ImageDB, texts: Sequence[Path], pairs: int, keys: Sequence[str]) -> Iterator[LookedAt]:
    """Evenly spaced texts of the first database (or those about `keys`) as the run's last checkpoint sees them with their pictures."""
    from uniter.datasets.batches.example import TokenSequence
    from uniter.datasets.image_db.origin import origins_of
    from uniter.model import UniterForPretraining, load
    from uniter.model.understanding.looking import look

    found = load(run, UniterForPretraining)
    model = found.model
    for origin in origins_of([regions]):
        if found.detector is not None and found.detector.is_another(origin):
            log.warning("%s learnt from the regions of %s, but these are of %s; little of it means much", run, found.detector, origin)
    database = TextDB(texts[0])
    numbers = [number for key in keys for number in database.images()[key][:1]]
    if not keys:
        numbers = [len(database) * place // pairs for place in range(min(pairs, len(database)))]
    vocabularies: dict[Path, Tokenizer | None] = {}
    for number in numbers:
        key = database.image_key(number)
        if not isinstance(key, str):
            raise BadInput(f"{database.path} has examples about several pictures; only texts about one picture are looked at")
        record = regions[key]
        ids = [database.cls_id, *database.record(number)["input_ids"], database.sep_id]
        seen = look(model, TokenSequence(ids, record.features, record.norm_bb), example=database.ids[number])
        tokenizer = _tokenizer(database, vocabularies)
        yield LookedAt(
            title=f"{database.ids[number]} with {key}",
            key=key,
            words=tokenizer.tokens(ids) if tokenizer is not None else list(map(str, ids)),
            regions=record,
            maps={"attention of the last layer, mean over its heads": seen.attention_TR, "transport plan": seen.plan_TR},
            note=f"match {seen.match:.3f}",
        )


def _outcomes(run: str, regions: Sequence[str], texts: Path, count: int, keys: Sequence[str]) -> Outcomes | None:
    """What a fine-tuned run's best checkpoint got right and wrong on these texts, with its hardest examples; None of a pre-trained run."""
    from uniter.model.evaluation.outcomes import outcomes_of, task_of

    task, best = task_of(run), Path(run) / CHECKPOINTS / BEST
    if task is None:
        return None
    found = outcomes_of(task, str(best) if best.is_dir() else run, text=[str(texts)], images=list(regions))
    vocabularies: dict[Path, Tokenizer | None] = {}
    hardest = []
    for one in found.hardest(count, keys):
        record, drawn = found.corpus.record(one.number), found.keys_of(one)
        told = next((record[name] for name in ("question", "sent", "sentence") if isinstance(record.get(name), str)), None)
        rows = found.corpus.image_rows_NK[one.number].tolist()[: len(drawn)]
        sure = "" if one.judged.confidence is None else f"{one.judged.confidence:.2f} sure of it"
        hardest.append(
            HardExample(
                title=found.corpus.example_id(one.number),
                text=told if told is not None else _words(found.corpus.text_of(one.number), record.get("input_ids", []), vocabularies),
                said=one.said,
                truth=one.truth,
                note=sure,
                keys=drawn,
                regions=[found.corpus.regions(row) for row in rows],
                rows=([int(row) for row in one.judged.said], [int(row) for row in one.judged.truth]) if found.points else None,
            )
        )
    return Outcomes(f"{task} on {texts.name}", found.facts(), found.pairs(), found.cells, hardest)


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
    tokenizer = _tokenizer(database, vocabularies)
    if tokenizer is None:
        return f"{len(ids)} word pieces of {database.tokenizer_name}, whose vocabulary is not at hand"
    return " ".join(tokenizer.tokens(ids)).replace(" ##", "")


def _tokenizer(database: TextDB, known: dict[Path, Tokenizer | None]) -> Tokenizer | None:
    """The database's own vocabulary, or the one that it names; None where that is not at hand."""
    if database.path not in known:
        ours = (database.path / "vocab.txt").is_file()
        try:
            known[database.path] = Tokenizer.load(database.path if ours else database.tokenizer_name or "bert-base-cased")
        except BadInput:
            known[database.path] = None
    return known[database.path]


if __name__ == "__main__":
    main()
