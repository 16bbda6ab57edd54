"""The rows of other projects' layouts, by the names that `uniter-db convert --to` takes."""

from pathlib import Path
from typing import Final

from uniter.datasets.image_db.formats.projects import folders, hdf5_files, lmdbs, oscar, scan, selfcritical, vlbert
from uniter.datasets.image_db.formats.projects.layout import Layout, some_files

_FAMILIES: Final = (folders, hdf5_files, lmdbs, oscar, scan, selfcritical, vlbert)

_ORDER: Final = (
    *("m2", "selfcritical", "xmodaler", "openvqa_vqa", "openvqa_gqa", "milvlg", "mmf_npy", "mmf_lmdb", "vilbert_lmdb", "vlt5_h5"),
    *("volta_lmdb", "oscar_caption", "oscar_retrieval", "vinvl_predictions", "scan", "butd_vqa", "gqa_h5", "visdial_h5", "vlbert_zip"),
)

LAYOUTS: Final[dict[str, Layout]] = {name: family.ROWS[name] for name in _ORDER for family in _FAMILIES if name in family.ROWS}


def recognise_project(path: Path) -> str | None:
    """The name of the layout that lies at a path, by some of its files; None where it is none of these."""
    files = some_files(path)
    return next((name for name, layout in LAYOUTS.items() if layout.fits(files)), None)
