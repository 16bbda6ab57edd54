"""Asking a trained model about photographs."""

from uniter.model.understanding.asking import Understanding
from uniter.model.understanding.results import Answer, Classification, Grounding, Match, Ranking, Seen, in_words

__all__ = ["Answer", "Classification", "Grounding", "Match", "Ranking", "Seen", "Understanding", "in_words"]
