"""Detectron2's settings, changed by name: obeyed, or refused where they would change nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from uniter.datasets.errors import BadInput


def configured(cfg: CfgNode, overrides: Mapping[str, Any]) -> CfgNode:
    """The configuration with single settings of Detectron2's changed, by their dotted names."""
    for name, value in overrides.items():
        try:
            cfg.merge_from_list([name, value])
        except (KeyError, AssertionError, ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"--set {name}={value}: Detectron2 has no such setting or expects another kind of value ({error})") from error
    return cfg


class _Watched(CfgNode):  # type: ignore[misc]
    """A configuration that notes the dotted name of each setting that is read."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        self.__dict__["read"].add(self.__dict__["above"] + name)
        return value


def watched(cfg: CfgNode, read: set[str], above: str = "") -> CfgNode:
    """A copy of the configuration that adds to `read` the dotted name of each setting that is read from it."""
    copy = _Watched()
    copy.__dict__.update(read=read, above=above)
    for name, value in cfg.items():
        dict.__setitem__(copy, name, watched(value, read, f"{above}{name}.") if isinstance(value, CfgNode) else value)
    return copy


# What the run itself reads, and what Detectron2 reads although nothing here comes of it.
_OURS, _IN_VAIN = {"INPUT.FORMAT", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"}, {"VIS_PERIOD"}
_INSTEAD = {
    "MODEL.WEIGHTS": "--from",
    "MODEL.DEVICE": "--device",
    "MODEL.ROI_HEADS.NUM_CLASSES": "the categories of --annotations",
    "SOLVER.BASE_LR": "--learning-rate",
    "SOLVER.MAX_ITER": "--steps",
    "SOLVER.IMS_PER_BATCH": "--batch-size",
    "SOLVER.CHECKPOINT_PERIOD": "--set checkpoint_every=N",
    "TEST.EVAL_PERIOD": "--set validate_every=N",
    "DATASETS.TRAIN": "--annotations",
    "DATASETS.TEST": "--val-annotations",
    "DATALOADER.NUM_WORKERS": "--workers",
    "INPUT.MIN_SIZE_TRAIN": "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TRAIN": "INPUT.MAX_SIZE_TEST",
    "OUTPUT_DIR": "--out",
    "SEED": "--seed",
}


def refuse_settings_in_vain(asked: CfgNode, used: CfgNode, read: set[str], *, own: CfgNode, path: str | Path | None) -> None:
    """BadInput if a setting was changed that changes nothing: one that nothing reads, or that something else decides.

    Args:
        asked: the configuration as the user wants it.
        used: the configuration that the network was built by.
        read: the names of the settings that were read of it.
        own: the model's configuration before anything was changed. What is as there, or as Detectron2 has it, was not changed.
        path: the file that the configuration came from, for the message.
    """
    wanted, obeyed, before, usual = (_flat(cfg) for cfg in (asked, used, own, get_cfg()))
    effective = (read | _OURS) - _IN_VAIN
    # Images are as large in training as later; a configuration of ours says so.
    same_size = (
        wanted["INPUT.MIN_SIZE_TRAIN"] == [wanted["INPUT.MIN_SIZE_TEST"]]
        and wanted["INPUT.MAX_SIZE_TRAIN"] == wanted["INPUT.MAX_SIZE_TEST"]
    )
    effective |= {"INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN"} if same_size else set()
    vain = [
        name
        for name, value in wanted.items()
        if value not in (before.get(name), usual.get(name)) and not (name in effective and obeyed.get(name) == value)
    ]
    if vain:
        said = [f"{name}={wanted[name]!r}" + (f" (that is {_INSTEAD[name]} here)" if name in _INSTEAD else "") for name in vain]
        more = f" and {len(said) - 4} more" if len(said) > 4 else ""
        where = f" of {path}" if path else ""
        raise BadInput(f"{', '.join(said[:4])}{more}{where}: this training does not read it, so it would change nothing; leave it out")


def _flat(cfg: CfgNode, above: str = "") -> dict[str, Any]:
    """The settings by their dotted names; sequences as lists."""
    flat: dict[str, Any] = {}
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[above + name] = _listed(value)
    return flat


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, list | tuple) else value
