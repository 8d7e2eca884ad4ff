"""Heads that predict something of every cell of an image: the boxes of objects, or another image.

Shapes: B batch, C channels, H height, W width, T cells, D hidden size, L classes, N objects, s upscale, p patch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from .configuration_feedback import FeedbackConfig
from .feedback_calls import StatefulOutput, named_arguments
from .feedback_objectives import losses_of_units, row_means
from .feedback_states import FeedbackState
from .modeling_feedback_heads import FeedbackHead

# Weights of the matching and of the loss, those of DETR (Carion et al. 2020, arXiv:2005.12872).
COSTS = {"class_cost": 1, "bbox_cost": 5, "giou_cost": 2}
WEIGHTS = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
NOTHING = 0.1  # the weight of cells without an object


@dataclass
class FeedbackObjectDetectionOutput(StatefulOutput):
    """
    Args:
        loss: [], where labels were given.
        logits: [B, T, L + 1] of each cell; the last class is no object.
        pred_boxes: [B, T, 4], center x and y, width and height, as shares of the image.
        hidden_states, feedback_states, num_feedback_steps: as in FeedbackModelOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None

    references: ClassVar[Tensor | None] = None  # [B, T, 4] the boxes of the cells themselves, before a sigmoid


def image_sizes(pixels: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Return height and width of each image of a padded batch, [B, 2], in pixels."""
    if pixel_mask is None:
        return torch.tensor(pixels.shape[-2:], device=pixels.device).expand(len(pixels), 2)
    real = pixel_mask > 0
    return torch.stack([real.any(2).sum(1), real.any(1).sum(1)], dim=1)


class FeedbackForObjectDetection(FeedbackHead):
    """Find objects: every cell predicts a class, or none, and a box, which each pass refines.

    The set of predictions is matched with the objects one to one, by DETR's loss in transformers, so nothing has to be
    thinned out afterwards. With feedback_signal="output" classes and boxes themselves are fed back.
    """

    main_input_name = reads = "pixel_values"
    axes = 2
    takes_encoders = False
    needs = {"is_causal": False}
    can_be_right = False
    accepts_loss_kwargs = False  # the loss is a mean over the images, which Trainer divides itself

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        classes = config.num_labels
        self.class_labels_classifier = nn.Linear(config.hidden_size, classes + 1)
        self.bbox_predictor = nn.Linear(config.hidden_size, 4)
        self.feedback = self.feedback_projection(classes + 5)
        self.post_init()

    def predict(self, y: Tensor) -> Tensor:
        """Return the class logits [B, T, L + 1] of y [B, T, D]."""
        return self.class_labels_classifier(y)

    def embed_output(self, y: Tensor) -> Tensor:
        """Return a linear map of the classes and the box of each cell."""
        return self.feedback(torch.cat([self.predict(y).softmax(-1), self.bbox_predictor(y).sigmoid()], dim=-1))

    def references(self, grid: tuple[int, ...], sizes: Tensor) -> Tensor:
        """Return the box of each cell itself, twice as large, before a sigmoid: [B, T, 4]; sizes are [B, 2]."""
        patch = self.config.input_config.patch_size
        lines = [torch.arange(n, device=sizes.device, dtype=torch.float32) for n in grid]
        rows, columns = torch.meshgrid(*lines, indexing="ij")
        places = torch.stack([columns, rows], dim=-1).flatten(0, 1) + 0.5  # [T, 2]
        sizes = sizes.float().flip(1)[:, None]  # width, height
        boxes = [patch * places / sizes, (2 * patch / sizes).expand(-1, len(places), -1)]
        return torch.logit(torch.cat(boxes, dim=-1), eps=1e-3)

    def boxes(self, y: Tensor, references: Tensor) -> Tensor:
        """Return the boxes [B, T, 4] of y [B, T, D]."""
        return (references + self.bbox_predictor(y).float()).sigmoid()

    def classes(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """Return the class logits [B, T, L + 1] of y [B, T, D]; cells of padding hold no object."""
        logits = self.predict(y)
        if mask is None:
            return logits
        nothing = torch.full_like(logits, torch.finfo(logits.dtype).min)
        nothing[..., -1] = 0
        return torch.where(mask[..., None], logits, nothing)

    def step_logit(self, y: Tensor, outputs: Any) -> Tensor:
        return self.classes(y, outputs.positions_mask)

    def step_boxes(self, outputs: FeedbackObjectDetectionOutput) -> list[Tensor]:
        """Return the boxes after each feedback step, K of [B, T, 4], as `step_logits` does with the classes."""
        self.step_logits(outputs)
        return [self.boxes(y, outputs.references) for y in outputs.feedback_states or ()]  # type: ignore[arg-type]

    @named_arguments
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        num_feedback_steps: int | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        feedback_state: FeedbackState | None = None,
    ) -> FeedbackObjectDetectionOutput:
        """Return classes and boxes of pixel_values [B, C, H, W], and the loss, the mean of the images' losses.

        Args:
            pixel_mask: [B, H, W], 1 for real pixels, where images of several sizes are padded to one.
            labels: for each image `class_labels` [N] and `boxes` [N, 4], center x and y, width and height as shares of
                the image, as transformers' image processors make them.
        """
        outputs = self.run(
            labels is not None,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            num_feedback_steps=num_feedback_steps,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            feedback_state=feedback_state,
        )
        y, mask, loss = outputs.last_hidden_state, outputs.positions_mask, None
        references = self.references(outputs.grid, image_sizes(cast(Tensor, pixel_values), pixel_mask))
        if labels is not None:
            classes = cast(int, self.config.num_labels)
            check_boxes(labels, len(y), classes)
            real = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device) if mask is None else mask
            matcher = HungarianMatcher(**COSTS)
            criterion = ImageLoss(matcher, classes, NOTHING, ["labels", "boxes"]).to(y.device)

            def units(y: Tensor) -> Tensor:
                """Return the loss of each image, [B]."""
                logits, boxes = self.predict(y).float(), self.boxes(y, references)
                made = []
                for row, objects in enumerate(labels):
                    here, count = real[row], max(1, len(objects["boxes"]))
                    one = {"logits": logits[row, here][None], "pred_boxes": boxes[row, here][None]}
                    pairs = matcher(one, [objects])
                    # Not by `criterion` itself, which counts the boxes of all processes.
                    parts = [criterion.get_loss(name, one, [objects], pairs, count) for name in criterion.losses]
                    found = {name: value for part in parts for name, value in part.items()}
                    made.append(sum(weight * found[name] for name, weight in WEIGHTS.items()))
                return torch.stack(made)

            losses = losses_of_units(units, real.any(1), read=lambda x: row_means(x, mask))
            loss = self.total_loss(losses, outputs)
        return FeedbackObjectDetectionOutput(
            loss=loss,
            logits=self.classes(y, mask),
            pred_boxes=self.boxes(y, references),
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
        ).with_state(outputs.feedback_state, positions_mask=mask, grid=outputs.grid, references=references)


def check_boxes(labels: list[dict[str, Tensor]], batch: int, classes: int) -> None:
    """Raise ValueError for labels that no image can have."""
    if not isinstance(labels, list) or len(labels) != batch:
        count = len(labels) if isinstance(labels, list) else f"a {type(labels).__name__}"
        raise ValueError(f"labels are {count}, and the images {batch}: give a list with a dictionary for each image.")
    for row, objects in enumerate(labels):
        if not {"class_labels", "boxes"} <= objects.keys():
            raise ValueError(f"labels[{row}] has {', '.join(objects)}: give class_labels and boxes.")
        kinds, boxes = objects["class_labels"], objects["boxes"]
        if boxes.shape != (len(kinds), 4):
            raise ValueError(
                f"labels[{row}] has {len(kinds)} class_labels and boxes of the shape {[*boxes.shape]}: give a box of "
                "center x, center y, width and height for each object."
            )
        if not len(kinds):
            continue
        if kinds.min() < 0 or kinds.max() >= classes:
            raise ValueError(
                f"labels[{row}] has classes {int(kinds.min())} to {int(kinds.max())} and num_labels is {classes}: "
                "number them from 0, and set num_labels in the config."
            )
        if (boxes[:, 2:] <= 0).any():
            raise ValueError(f"labels[{row}] has a box of no width or height: leave it out.")
        if (boxes[:, :2] - boxes[:, 2:] / 2 < -0.01).any() or (boxes[:, :2] + boxes[:, 2:] / 2 > 1.01).any():
            raise ValueError(
                f"labels[{row}] has a box beyond the image: give shares of its width and height, from 0 to 1, and cut "
                "boxes at its edges."
            )


@dataclass
class FeedbackImageToImageOutput(StatefulOutput):
    """
    Args:
        loss: [], where labels were given.
        reconstruction: [B, C, s H, s W].
        hidden_states, feedback_states, num_feedback_steps: as in FeedbackModelOutput.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None

    base: ClassVar[Tensor | None] = None  # [B, C, s H, s W] what is added to
    real: ClassVar[Tensor | None] = None  # [B, s H, s W] 1 for real pixels


class AddedPixels(nn.Linear):
    """Read what is added to the pixels of a cell; zero at first, so that a fresh model makes the image it is given."""

    def init_parameters(self) -> None:
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class FeedbackForImageToImage(FeedbackHead):
    """Make one image of another: a larger one, with config.upscale, or one without noise, blur or holes.

    Each pass predicts what is to be added to the image, enlarged by bicubic interpolation. With
    feedback_signal="output" that prediction itself is fed back.
    """

    main_input_name = reads = "pixel_values"
    axes = 2
    takes_encoders = False
    needs = {"is_causal": False, "halting_measure": "state"}
    can_be_right = False
    accepts_loss_kwargs = False

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.side = config.upscale * config.input_config.patch_size  # of what a cell becomes, in pixels
        size = config.input_config.num_channels * self.side**2
        self.readout = AddedPixels(config.hidden_size, size)
        self.feedback = self.feedback_projection(size)
        self.post_init()

    def predict(self, y: Tensor) -> Tensor:
        """Return what is added to the pixels of each cell, [B, T, C (s p)²]."""
        return self.readout(y)

    def embed_output(self, y: Tensor) -> Tensor:
        return self.feedback(self.predict(y))

    def change(self, y: Tensor, grid: tuple[int, ...], height: int, width: int) -> Tensor:
        """Return what is added to the image, [B, C, height, width], of y [B, T, D] on a grid of cells."""
        cells = self.predict(y).transpose(1, 2)
        shape = tuple(self.side * n for n in grid)
        return F.fold(cells, shape, self.side, stride=self.side)[..., :height, :width]

    def enlarged(self, pixels: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """Return the images [B, C, H, W], `upscale` times as large, without looking at padding."""
        scale = self.config.upscale
        if scale == 1:
            return pixels

        def enlarge(images: Tensor) -> Tensor:
            return F.interpolate(images, scale_factor=scale, mode="bicubic", align_corners=False)

        if pixel_mask is None:
            return enlarge(pixels)
        made = pixels.new_zeros(*pixels.shape[:2], scale * pixels.shape[2], scale * pixels.shape[3])
        for row, (height, width) in enumerate(image_sizes(pixels, pixel_mask).tolist()):
            image = pixels[row : row + 1, :, :height, :width]
            made[row, :, : scale * height, : scale * width] = enlarge(image)[0]
        return made

    def step_logit(self, y: Tensor, outputs: Any) -> Tensor:
        """Return the image of y [B, T, D], one of `outputs.feedback_states`: [B, C, s H, s W]."""
        return outputs.base + self.change(y, outputs.grid, *outputs.base.shape[-2:]) * outputs.real[:, None].to(
            y.dtype
        )

    @named_arguments
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        num_feedback_steps: int | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        feedback_state: FeedbackState | None = None,
    ) -> FeedbackImageToImageOutput:
        """Return the image [B, C, s H, s W] made of pixel_values [B, C, H, W], and the mean absolute error to labels.

        Args:
            labels: [B, C, s H, s W], the images to be made, in the units of pixel_values.
            pixel_mask: [B, H, W], 1 for real pixels, where images of several sizes are padded to one.
        """
        outputs = self.run(
            labels is not None,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            num_feedback_steps=num_feedback_steps,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            feedback_state=feedback_state,
        )
        pixels = self.model.embeddings.coloured(pixel_values, 1)
        base = self.enlarged(pixels, pixel_mask)
        y, grid, shape, loss = outputs.last_hidden_state, outputs.grid, tuple(base.shape[-2:]), None
        real = torch.ones_like(base[:, 0], dtype=torch.float32)  # half precision can't count so far
        if pixel_mask is not None:
            scale = self.config.upscale
            real = pixel_mask.float().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        if labels is not None:
            if labels.shape != base.shape:
                raise ValueError(
                    f"labels have the shape {[*labels.shape]} and the images made {[*base.shape]}: give images "
                    f"{self.config.upscale} times as large as pixel_values, which config.upscale says."
                )

            def units(y: Tensor) -> Tensor:
                """Return the mean absolute error of each image, [B]."""
                errors = (base + self.change(y, grid, *shape) - labels).abs().mean(1).float()
                return (errors * real).flatten(1).sum(1) / real.flatten(1).sum(1)

            losses = losses_of_units(
                units, real.new_ones(len(real)), read=lambda x: row_means(x, outputs.positions_mask)
            )
            loss = self.total_loss(losses, outputs)
        return FeedbackImageToImageOutput(
            loss=loss,
            reconstruction=base + self.change(y, grid, *shape) * real[:, None].to(y.dtype),
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
        ).with_state(outputs.feedback_state, positions_mask=outputs.positions_mask, grid=grid, base=base, real=real)
