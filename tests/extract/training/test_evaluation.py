"""What is counted as found, missed and wrong on the photographs held out."""

from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, Instances

from uniter.datasets.made_up.files import write_world
from uniter.extract.detector.preparation import ShortestEdgePreparation
from uniter.extract.training.evaluation import Evaluation, evaluate_boxes
from uniter.extract.training.labelled_images import LabelledImages, read_labelled_images

Answer = list[tuple[list[float], float, int]]  # boxes, confidences, classes of one photograph


class _Knowing(torch.nn.Module):
    """A network that answers with given boxes, photograph by photograph."""

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def forward(self, items: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        outputs = []
        for item in items:
            rows = next(self.answers)
            found = Instances((item["height"], item["width"]))
            found.pred_boxes = Boxes(torch.tensor([box for box, _, _ in rows], dtype=torch.float32).reshape(-1, 4))
            found.scores = torch.tensor([score for _, score, _ in rows])
            found.pred_classes = torch.tensor([number for _, _, number in rows], dtype=torch.int64)
            outputs.append({"instances": found})
        return outputs


def evaluated(world: Path, labelled: LabelledImages, answers: list[Answer]) -> Evaluation:
    return evaluate_boxes(_Knowing(answers), labelled, ShortestEdgePreparation(64, 128, "RGB"), folder=world / "images")


def test_mistakes_are_counted_and_the_worst_stand_first(tmp_path: Path) -> None:
    write_world(tmp_path, images=8, held_out=6, seed=1)
    labelled = read_labelled_images(tmp_path / "images", tmp_path / "instances_val.json")
    truth = [
        [(box, 0.9, number) for box, number in zip(image.boxes.tolist(), image.classes.tolist(), strict=True)] for image in labelled.images
    ]
    third = [([0.0, 0.0, 3.0, 3.0], 0.5, truth[2][0][2]), *truth[2][1:]]
    answers = [truth[0], [(box, 0.1, number) for box, _, number in truth[1]], third, *truth[3:]]
    evaluation = evaluated(tmp_path, labelled, answers)
    names = [image.path.name for image in labelled.images]
    mistakes = {picture.file: (picture.missed, picture.wrong) for picture in evaluation.worst}
    assert mistakes == {**dict.fromkeys(names, (0, 0)), names[1]: (len(truth[1]), 0), names[2]: (1, 1)}
    assert [picture.file for picture in evaluation.worst[:2]] == [names[1], names[2]]
    nothing = evaluated(tmp_path, labelled, [[] for _ in names])
    assert nothing.figures["ap"] == 0 and all(row.ap == row.ap50 == 0 for row in nothing.classes)
