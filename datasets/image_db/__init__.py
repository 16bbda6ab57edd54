"""Region databases: the record, its bytes, ours and published ones, and how they are written.

`ImageDB(path)[key]` gives `RegionFeatures`.
"""

from uniter.datasets.image_db.database import ImageDB
from uniter.datasets.image_db.records import MissingImage
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.transformers_inputs import lxmert_inputs, visualbert_inputs

__all__ = ["ImageDB", "MissingImage", "RegionFeatures", "lxmert_inputs", "visualbert_inputs"]
