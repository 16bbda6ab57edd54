"""What VinVL's detector is made of, without its golden arrays: suppression, selection rules, label maps, weights that are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.detector.preparation import VinvlPreparation
from uniter.extract.detector.protocol import RawRegions
from uniter.extract.detector.recipes import find_recipe, with_label_map
from uniter.extract.detector.vinvl_selection import _surviving_together, surviving
from uniter.extract.select import RULES, select_regions
from uniter.extract.weights.label_map import LABEL_MAP, read_label_map
from uniter.extract.weights.vinvl import SHARED_STAGE, STEM, from_vinvl


@pytest.mark.parametrize("per_class", [False, True])
def test_suppression_of_all_classes_at_once_is_that_of_each_class(per_class: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    classes, count = 7, 60
    corners = torch.rand((classes if per_class else 1, count, 2), generator=generator) * 60
    boxes = torch.cat([corners, corners + 1 + torch.rand(corners.shape, generator=generator) * 40], dim=2)
    boxes[:, 10:15] = boxes[:, :5]
    boxes[:, 20, 2:] = boxes[:, 20, :2]  # of no area
    scores = (torch.rand((classes, count), generator=generator) * 20).round() / 20  # many are equal
    for threshold in (0.3, 0.5):
        expected = surviving(boxes, scores, threshold)
        assert 0 < expected.sum() < expected.numel()
        assert torch.equal(_surviving_together(boxes, scores, threshold), expected)


def kept(rule: str, confidence: list[float], *, threshold: float = 0.2, least: int = 2, most: int = 4) -> list[int]:
    return [int(row) for row in RULES[rule].keep(np.array(confidence, dtype=np.float32), least, most, threshold)]


def test_selection_rules_differ_where_the_reference_does() -> None:
    assert kept("vinvl-filter-1", [0.2, 0.9, 0.1]) == [1, 0], "the threshold itself passes"
    assert kept("own", [0.2, 0.9, 0.3]) == [1, 2], "here it does not"
    assert kept("vinvl-filter-1", [0.001, 0.0, 0.0]) == [0], "what was suppressed never stays"
    assert kept("vinvl-filter-1", [0.001, 0.0015]) == [1, 0], "too few: the best, however weak"
    assert kept("vinvl-filter-2", [0.001, 0.5, 0.0015]) == [1], "but none at a hundredth of the threshold"
    assert kept("vinvl-filter-0", [0.11, 0.12, 0.13, 0.09]) == [2, 1, 0], "the threshold was halved once, which lets three pass"
    assert kept("vinvl-filter-0", [0.5, 0.6, 0.7, 0.8, 0.9]) == [4, 3, 2, 1]


def test_regions_say_by_whose_confidence_they_stay() -> None:
    boxes, width = np.array([[0, 0, 5, 5]], dtype=np.float32), np.ones((1, 3), dtype=np.float32)
    plain = RawRegions(boxes, width, width / 3)
    with pytest.raises(ValueError, match=r"rule 'own', but regions without a confidence of their own"):
        select_regions(plain, size=(9, 9), rule="own")
    with pytest.raises(ValueError, match=r"rule 'caffe', but regions with a confidence of their own"):
        select_regions(RawRegions(boxes, width, width / 3, confidence=np.ones(1, dtype=np.float32)), size=(9, 9))


@pytest.mark.parametrize(
    ("size", "network"), [((200, 150), (800, 600)), ((661, 893), (600, 810)), ((300, 97), (998, 323)), ((600, 900), (600, 900))]
)
def test_the_longer_side_is_truncated(size: tuple[int, int], network: tuple[int, int]) -> None:
    assert VinvlPreparation().network_size(size[1], size[0]) == (network[1], network[0])


# Names


def label_map(**changed: Any) -> dict[str, Any]:
    return {"label_to_idx": {"cat": 2, "ad": 1}, "attribute_to_idx": {"red": 1}, **changed}


def test_names_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(label_map()))
    assert read_label_map(tmp_path / "map.json", classes=2, attributes=1) == (("ad", "cat"), ("red",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            json.dumps(label_map(label_to_idx={"ad": 1})),
            r"label_to_idx holds 1 names, with 1 different whole numbers; these weights have 2",
        ),
        (json.dumps(label_map(label_to_idx={"ad": 0, "cat": 1})), r"numbered from 1 to 2"),
        (json.dumps(label_map(label_to_idx={"ad": 1, "cat": 1})), r"2 names, with 1 different whole numbers"),
        (json.dumps(label_map(label_to_idx={"ad": True, "cat": "2"})), r"2 names, with 0 different whole numbers"),
        (json.dumps({"label_to_idx": {"ad": 1, "cat": 2}}), r"no attribute_to_idx in it"),
        ("[]", r"map\.json"),
        ("{", r"map\.json"),
    ],
)
def test_a_label_map_of_other_weights_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(BadInput, match=words):
        read_label_map(tmp_path / "map.json", classes=2, attributes=1)


def test_without_a_label_map_classes_are_numbered_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = find_recipe("vinvl")
    numbered = with_label_map(recipe, None, weights=str(tmp_path / "vinvl.pth"))
    assert numbered.class_names[0] == "class 1" and numbered.class_names[-1] == "class 1594" and len(numbered.attribute_names) == 524
    assert "its classes and attributes are numbered" in caplog.text
    classes = {f"thing {number}": number for number in range(1, 1595)}
    attributes = {f"look {number}": number for number in range(1, 525)}
    (tmp_path / "vinvl.pth").touch()
    (tmp_path / LABEL_MAP).write_text(json.dumps(label_map(label_to_idx=classes, attribute_to_idx=attributes)))
    named = with_label_map(recipe, None, weights=str(tmp_path / "vinvl.pth"))
    assert named.class_names[-1] == "thing 1594" and named.attribute_names[0] == "look 1"
    assert named == with_label_map(recipe, str(tmp_path / LABEL_MAP), weights=None)
    with pytest.raises(UniterError, match="no such file"):
        with_label_map(recipe, str(tmp_path / "absent.json"), weights=None)
    with pytest.raises(UniterError, match="detector 'butd' has its names already; leave it out"):
        with_label_map(find_recipe("butd"), str(tmp_path / LABEL_MAP), weights=None)


# Weights


def test_two_names_of_one_layer_must_agree() -> None:
    box, attribute = (f"{name}0.conv1.weight" for name in SHARED_STAGE)
    stem = {STEM: torch.ones(1)}
    assert from_vinvl({**stem, box: torch.ones(2), attribute: torch.ones(2)}, path="x").keys() == {
        "backbone.stem.conv1.weight",
        "roi_heads.res5.0.conv1.weight",
    }
    with pytest.raises(BadInput, match="are one layer of the network, but hold different values"):
        from_vinvl({**stem, box: torch.ones(2), attribute: torch.zeros(2)}, path="x")


def test_a_variance_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="a variance that is not above 0"):
        from_vinvl({STEM: torch.ones(1), "backbone.body.stem.bn1.running_var": torch.tensor([1.0, 0.0])}, path="x")


def test_every_published_name_is_known() -> None:
    """The names of `vinvl_state_dict_keys.tsv`, which lies beside the project."""
    table = Path(__file__).resolve().parents[4] / "shared" / "facts" / "vinvl_state_dict_keys.tsv"
    if not table.is_file():
        pytest.skip(f"{table} is absent")
    lines = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    tensors = {line[0]: torch.ones([int(side) for side in line[1].split("x")], dtype=torch.int8) for line in lines}
    converted = {name: "x".join(map(str, tensor.shape)) for name, tensor in from_vinvl(tensors, path="x").items()}
    assert converted == {line[2]: line[3] for line in lines if line[2] != "-"}
