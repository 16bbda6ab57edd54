"""Text databases: captions and the down-stream tasks' examples.

`TextDB(path)[id]` gives one example.
"""

from uniter.datasets.text_db.database import TextDB
from uniter.datasets.text_db.records import MissingExample

__all__ = ["MissingExample", "TextDB"]
