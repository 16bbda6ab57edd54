"""What can be asked on the page, and the answers as JSON.

What a reader would get wrong: which questions there are follows from the runs that were given. What none of them can answer is not left out
but says why, and which run could.
"""

from collections.abc import Sequence
from typing import Any, Final

from uniter.cli.web.photographs import Photograph
from uniter.datasets.errors import BadInput
from uniter.model.understanding.asking import Understanding
from uniter.model.understanding.results import Answer, Classification, Grounding, Match, Ranking, Seen

QUESTIONS: Final[dict[str, type[Seen]]] = {
    "match": Match,
    "answer": Answer,
    "ground": Grounding,
    "rank": Ranking,
    "classify": Classification,
}
"""What the page calls a question, as `Understanding` does, and what is the result."""
SEVERAL: Final = "rank"  # of several photographs; all others are of one
LABELS: Final = 10  # labels that are listed of a run of own labels, likeliest first


def abilities(asked: Understanding) -> dict[str, dict[str, Any]]:
    """Of each question the checkpoint that it goes to, or why it cannot be asked."""
    found: dict[str, dict[str, Any]] = {}
    for question, result in QUESTIONS.items():
        try:
            found[question] = {"by": asked.source_of(result), "why_not": None}
        except BadInput as error:
            found[question] = {"by": None, "why_not": str(error)}
    return found


def answer(asked: Understanding, question: str, photographs: Sequence[Photograph], text: str) -> dict[str, Any]:
    """Ask, and put the answer as JSON; of one photograph with what each word of the text attends to.

    Raises:
        BadInput: there is no such question, no run can answer it, or not so; the sentence says what to do.
    """
    if question not in QUESTIONS:
        raise BadInput(f"no question is called {question!r}; known are {', '.join(QUESTIONS)}")
    if question == SEVERAL:
        if len(photographs) < 2:
            raise BadInput(f"{len(photographs)} photographs to choose from; add at least two")
        result: Seen = asked.rank(photographs, text)
    elif len(photographs) != 1:
        raise BadInput(f"{len(photographs)} photographs, but this is asked of one; choose it")
    else:
        result = getattr(asked, question)(photographs[0], text)
    return {"question": question, "text": text, "by": result.source, **_values(result, photographs), "words": _words(asked, result)}


def _values(result: Seen, photographs: Sequence[Photograph]) -> dict[str, Any]:
    match result:
        case Match():
            return {"probability": result.probability}
        case Answer():
            return {"best": [{"answer": name, "probability": probability} for name, probability in result.best]}
        case Grounding():
            probabilities = [round(float(value), 5) for value in result.probabilities]
            return {"region": result.region, "probabilities": probabilities, "zero_shot": result.zero_shot}
        case Ranking():
            return {
                "order": [
                    {"key": photographs[place].key, "probability": float(result.probabilities[place])} for place in result.order.tolist()
                ]
            }
        case Classification():
            listed = list(result.probabilities.items())[:LABELS]
            best = [{"answer": name, "probability": probability, "given": name in result.labels} for name, probability in listed]
            return {"best": best, "score": result.score}
    raise TypeError(f"{type(result).__name__} is no answer to a question of the page")


def _words(asked: Understanding, result: Seen) -> list[dict[str, Any]]:
    """Each word and its weights on the regions; none of a ranking, which is of several photographs, and of no text."""
    if isinstance(result, Ranking) or not result.text.strip():
        return []
    attended = asked.attention(result)
    return [{"word": word, "weights": [round(float(weight), 5) for weight in weights]} for word, weights in attended]
