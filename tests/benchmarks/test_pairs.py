"""The benchmark of pairs runs; it compares the scores of both ways itself."""

from collections.abc import Callable
from types import ModuleType


def test_each_picture_is_read_once_and_scores_stay(script: Callable[[str], ModuleType]) -> None:
    found = script("pairs").main(["--texts", "5", "--pictures", "4", "--repeats", "1", "--batch-tokens", "500", "--json"])
    assert found["pictures_read"] == {"a pair": 20, "once": 4} and found["largest_difference"] < 1e-5
