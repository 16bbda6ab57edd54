"""What a fine-tuned model says of each example of a part beside what is right: what pages to look at are made of."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from uniter.datasets.batches.corpus import Corpus
from uniter.datasets.batches.plans import Part
from uniter.datasets.errors import BadInput
from uniter.model.checkpoints.beside import told_beside
from uniter.model.checkpoints.read import find_weights
from uniter.model.evaluation.finetuned import Asked, opened
from uniter.model.tasks.judging import Judged, calibration, calibration_error, named_answers
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.tasks.task import extras
from uniter.model.train.distributed import processes


@dataclass(frozen=True)
class Outcome:
    """One example: its number in the corpus, what was said and what is right, and both in words."""

    number: int
    judged: Judged
    said: str
    truth: str


@dataclass(frozen=True)
class PartOutcomes:
    """All examples of a part.

    Attributes:
        task: of the model.
        corpus: the examples that have a label.
        outcomes: of each, in corpus order.
        points: the answers are regions.
    """

    task: str
    corpus: Corpus
    outcomes: Sequence[Outcome]
    points: bool

    @property
    def cells(self) -> list[tuple[float, float, int]]:
        """(mean confidence, share right, examples) of each tenth of confidence."""
        return calibration([one.judged for one in self.outcomes])

    @property
    def has_scores(self) -> bool:
        """Whether numbers are predicted, and no answers."""
        return all(one.judged.confidence is None for one in self.outcomes)

    def facts(self) -> dict[str, str]:
        """Figures in words."""
        facts = {"examples": f"{len(self.outcomes):,}"}
        facts |= {f"left out: {reason}": f"{count:,}" for reason, count in self.corpus.left_out.items()}
        if self.has_scores:
            return facts | {"mean distance": f"{sum(one.judged.surprise for one in self.outcomes) / len(self.outcomes):.4g}"}
        facts["right"] = f"{sum(one.judged.right for one in self.outcomes) / len(self.outcomes):.4f}"
        return facts | {"expected calibration error": f"{calibration_error(self.cells):.4f}"}

    def pairs(self) -> Counter[tuple[str, str]]:
        """How often each (truth, said) came; nothing where answers are regions or scores."""
        if self.points or self.has_scores:
            return Counter()
        return Counter((one.truth, one.said) for one in self.outcomes)

    def hardest(self, count: int, keys: Sequence[str] = ()) -> list[Outcome]:
        """The most surprising examples first; of these pictures where some are named."""
        chosen = [one for one in self.outcomes if not keys or set(keys) & set(self.keys_of(one))]
        return sorted(chosen, key=lambda one: -one.judged.surprise)[:count]

    def keys_of(self, outcome: Outcome) -> list[str]:
        """The keys of an example's pictures; of VCR's two sets of regions of one picture the first."""
        rows = self.corpus.image_rows_NK[outcome.number].tolist()
        keys = [self.corpus.images.keys_list[row] for row in rows]
        return keys[:1] if "qa_target" in self.corpus.record(outcome.number) else keys


def task_of(start_from: str) -> str | None:
    """The down-stream task that a run or checkpoint was trained for; None of pre-trained ones, and where nothing tells."""
    told = told_beside(find_weights(start_from)).get("task")
    return told if told in DOWNSTREAM else None


def outcomes_of(name: str, start_from: str, *, text: Sequence[str], images: Sequence[str], device: str | None = None) -> PartOutcomes:
    """Ask the model of each example.

    Raises:
        BadInput: as `evaluate_finetuned`; or the task has no single answers (retrieval).
    """
    asked = Asked(text, images, batch_tokens=8192, workers=None, precision=None, other_detector=False)
    with processes(device) as everyone:
        run = opened(name, start_from, asked, everyone, labels=True)
        row = extras(run.task)
        if row.judge is None:
            raise BadInput(
                f"{start_from} was trained for {name}, which ranks and gives no single answers, so there is nothing to show; "
                f"uniter-train evaluate {name} has its figures"
            )
        part = Part("outcomes", run.corpus, run.task.sample, lengths=run.task.lengths)
        found: dict[int, Judged] = {}
        with run.scoring.shown(len(run.corpus), unit="examples", label="asking") as scoring:
            for made, batch, outputs in scoring.scored(part, run.task.head):
                found |= dict(zip(made.plan.examples.tolist(), row.judge(outputs, batch.targets), strict=True))
        names = row.words or run.answers
        region = "region {:g}" if row.points else None

        def in_words(answers: Sequence[float]) -> str:
            return ", ".join(region.format(place) for place in answers) or "no region" if region else named_answers(answers, names)

        outcomes = [
            Outcome(number, found[number], in_words(found[number].said), in_words(found[number].truth)) for number in range(len(run.corpus))
        ]
    return PartOutcomes(name, run.corpus, outcomes, row.points)
