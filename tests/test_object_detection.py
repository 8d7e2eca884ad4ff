"""Detection: boxes of a data set, COCO's precision, the loss of transformers, boxes of cells by hand."""

import pytest
import torch
from conftest import assert_close, build
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value
from PIL import Image as Pillow
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from feedback_transformers import FeedbackForObjectDetection
from feedback_transformers.training.scripts import objects

FIELDS = {"input_config": {"type": "images", "num_channels": 1, "patch_size": 4}, "is_causal": False, "num_labels": 3}


def dataset(boxes, classes, names=None, size=(40, 20)):
    kind = Value("string") if names is None else ClassLabel(names=names)
    features = Features(
        image=Image(), objects={"bbox": Sequence(Sequence(Value("float32"))), "category": Sequence(kind)}
    )
    rows = {"image": [Pillow.new("L", size)], "objects": [{"bbox": boxes, "category": classes}]}
    return DatasetDict(train=Dataset.from_dict(rows, features))


def test_boxes_are_cut_at_the_edges_and_counted():
    data = dataset([[30, 10, 20, 20], [1, 2, 3, 4]], ["dog", "cat"])
    names = objects.class_names(data, "objects", objects.category_key(data, "objects"))
    assert names == ["cat", "dog"]
    boxes = objects.Boxes(names, "objects", "category")
    (found,) = boxes.check(data["train"], "train")
    assert [each["bbox"] for each in found] == [[30, 10, 10, 10], [1, 2, 3, 4]] and boxes.cut == 1
    assert [each["category_id"] for each in found] == [1, 0]


def test_boxes_without_an_area():
    data = dataset([[50, 0, 5, 5], [1, 1, 0, 3], [1, 1, 2, 2]], ["cat"] * 3)
    with pytest.raises(
        ValueError, match="2 boxes have no area in their image .*row 0 of the train data: 50, 0, 5 x 5"
    ):
        objects.Boxes(["cat"], "objects", "category").check(data["train"], "train")
    dropping = objects.Boxes(["cat"], "objects", "category", drop=True)
    assert len(dropping.check(data["train"], "train")[0]) == 1 and len(dropping.dropped) == 2


def test_a_checkpoint_is_asked_in_its_own_classes():
    """Data that numbers them otherwise, and a class that the model does not know."""
    data = dataset([[1, 1, 2, 2]], [0], names=["dog", "cat"])
    numbered = objects.numbered_names(data, "objects", "category")
    (found,) = objects.Boxes(["cat", "dog"], "objects", "category", numbered=numbered).check(data["train"], "train")
    assert found[0]["category_id"] == 1
    with pytest.raises(ValueError, match="row 0 of the train data has the class 'dog'; the model knows cat"):
        objects.Boxes(["cat"], "objects", "category", numbered=numbered).check(data["train"], "train")


def test_average_precision_by_hand():
    """Two objects: both found; then one of them only at an IoU of 1/3."""
    boxes, kinds = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]]), torch.tensor([1, 0])
    logits = torch.full((1, 3, 4), -9.0)
    logits[0, 0, 1] = logits[0, 1, 0] = logits[0, 2, 3] = 9
    truth = [[{"class_labels": kinds, "boxes": boxes}]]
    found = torch.cat([boxes, torch.rand(1, 4)])[None]
    assert objects.average_precision([(logits, found)], truth) == pytest.approx({"map": 1, "map_50": 1})
    found[0, 0, 0] += 0.1
    assert objects.average_precision([(logits, found)], truth) == pytest.approx({"map": 0.5, "map_50": 0.5})


def test_the_loss_is_that_of_detr():
    model = build(FeedbackForObjectDetection, **FIELDS)
    labels = [
        {"class_labels": torch.tensor([2, 0]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.4], [0.7, 0.6, 0.4, 0.3]])}
    ]
    outputs = model(torch.randn(1, 1, 12, 16), labels=labels)

    class Settings:
        class_cost, bbox_cost, giou_cost, eos_coefficient, auxiliary_loss, num_labels = 1, 5, 2, 0.1, False, 3
        bbox_loss_coefficient, giou_loss_coefficient = 5, 2

    expected = ForObjectDetectionLoss(outputs.logits, labels, "cpu", outputs.pred_boxes, Settings)[0]
    assert_close(outputs.loss, expected, 1e-5)


def test_a_cell_begins_with_its_own_box():
    """Without a change by the model: the middle of the cell, and twice its size."""
    model = build(FeedbackForObjectDetection, **FIELDS)
    torch.nn.init.zeros_(model.bbox_predictor.weight)
    torch.nn.init.zeros_(model.bbox_predictor.bias)
    boxes = model(torch.randn(1, 1, 12, 16)).pred_boxes[0].view(3, 4, 4)
    assert_close(boxes[1, 2], torch.tensor([(2.5 * 4) / 16, (1.5 * 4) / 12, 8 / 16, 8 / 12]), 1e-5)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([], "give a list with a dictionary for each image"),
        ([{"boxes": torch.zeros(0, 4)}], "give class_labels and boxes"),
        ([{"class_labels": torch.tensor([1]), "boxes": torch.zeros(2, 4)}], "a box of center x, center y"),
        ([{"class_labels": torch.tensor([3]), "boxes": torch.full((1, 4), 0.4)}], "num_labels is 3: number them"),
        ([{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0, 0.1]])}], "no width or height"),
        ([{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[9, 9, 4, 4.0]])}], "a box beyond the image"),
    ],
)
def test_labels_that_no_image_can_have(labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(FeedbackForObjectDetection, **FIELDS)(torch.randn(1, 1, 8, 8), labels=labels)
