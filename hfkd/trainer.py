"""`DistillationTrainer`: transformers' Trainer with a teacher and distillation losses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from .arguments import DistillationConfig
from .data import ImageDataset, NoAugmentation, collate_batch
from .distiller import Distiller
from .features import forward_views, logits_of
from .loading import exported_state_dict, wrap_timm
from .losses import DistillationLoss, build_losses
from .losses.standardize import at_least_float32
from .metrics import ImageClassificationMetrics
from .teacher import Teacher

logger = logging.get_logger(__name__)

LOSSES_NAME = "losses.safetensors"


def _image_source(dataset) -> ImageDataset | None:
    """The `ImageDataset` that a data set is, or is a subset of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, ImageDataset) else None


class _SetEpoch(TrainerCallback):
    """Tells the training set which epoch it is: Trainer forgets a resumed epoch, and every epoch under DDP."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class DistillationTrainer(Trainer):
    """Trains a student on the labels and on what a teacher says of the same images.

    `model` stays the student, so that saving, loading the best checkpoint, pushing and callbacks see a plain
    transformers model; what is prepared (optimizer, DDP, torch.compile) is the `Distiller` around it, which also
    holds the losses. Their state is part of every checkpoint and never of the exported student.

    Args:
        model: the student: a transformers image classifier, a timm model (`trainer.model` is then transformers'
            wrapper around it) or a module that returns logits (B, C).
        teacher: a `Teacher` (see `load_teacher`) or a model, which is frozen in place. None: labels alone.
        args: the `DistillationConfig`.
        train_dataset, eval_dataset: `hfkd.data.ImageDataset`, or any data set whose batches hold `pixel_values`
            (B, 3, H, W) and `labels` (B,).
        losses: in place of `args.losses`; values may also be `DistillationLoss` instances.
        **kwargs: everything else that `Trainer` takes.

    `evaluate()` gives `eval_loss` (cross-entropy), `eval_top1`, `eval_top5` and, with a teacher, `eval_agreement`
    (how often both choose the same class) and `eval_teacher_top1`, in percent.

    Raises:
        ValueError: before training starts, if losses, networks and data do not fit one another.
    """

    # compute_loss returns a mean over its batch: Trainer divides it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        args: DistillationConfig | None = None,
        *,
        train_dataset=None,
        eval_dataset=None,
        losses: Mapping[str, dict[str, Any] | DistillationLoss] | None = None,
        **kwargs,
    ):
        args = args or DistillationConfig(output_dir="trainer_output")
        if args.n_gpu > 1:
            logger.warning("Several GPUs are visible and this process uses one: `accelerate launch` uses all of them.")
            args._n_gpu = 1
        losses = build_losses(args.losses if losses is None else losses, args.logit_standardization)
        _check_roles(model, teacher, losses, args)
        if hasattr(model, "pretrained_cfg"):  # a bare timm model
            source = _image_source(train_dataset)
            names = source.class_names if source else []
            names = [*names, *map(str, range(len(names), model.num_classes))][: model.num_classes]
            model = wrap_timm(model, names)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        kwargs.setdefault("data_collator", collate_batch)
        kwargs.setdefault("compute_metrics", _compute_metrics)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        if self.teacher is not None:
            autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            self.teacher.prepare(args.device, autocast_dtype, args.channels_last)
        self.distiller = Distiller(self.model, losses, args.ce_weight)
        self._term_names: list[str] = []
        self._term_sums: Tensor | None = None
        self._term_count = self._images_seen = 0
        self._clock = time.perf_counter()
        self._keep_logits = False
        self._teacher_memories: WeakKeyDictionary[ImageDataset, Tensor] = WeakKeyDictionary()
        self._teacher_memory: Tensor | None = None
        self._place_data()
        self._dry_run()
        self.distiller.to(args.device)
        if self.teacher is not None and args.torch_compile:
            self.teacher.model.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)

    # ---- Before training ---------------------------------------------------------------------------------------

    def _place_data(self) -> None:
        """Small images live on the training device and are augmented there."""
        for dataset in (_image_source(self.train_dataset), _image_source(self.eval_dataset)):
            if dataset is not None and self.args.dataloader_num_workers == 0:
                dataset.to(self.args.device)
                self.args.dataloader_pin_memory = False  # the batches are on the device already
        train_images = _image_source(self.train_dataset)
        if train_images is not None:
            train_images.views = max([loss.views for loss in self.distiller.losses.values()], default=1)
            self.add_callback(_SetEpoch(train_images))

    def _dry_run(self) -> None:
        """One forward of two images: do the classes agree, and which shapes will the losses see?"""
        dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        if dataset is None or isinstance(dataset, IterableDataset | dict):
            return
        pair = [0, len(dataset) - 1]
        source = _image_source(dataset)
        samples = [dataset[i] for i in pair] if source is None else dataset.__getitems__(pair)
        batch = self._prepare_inputs(self.data_collator(samples))
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            student = forward_views(self.model, batch)
        self.model.train(was_training)
        classes = student.logits.shape[1]
        needed = source.num_classes if source else int(batch["labels"].max()) + 1
        if classes < needed:
            raise ValueError(
                f"The student has {classes} classes and the data set {needed}: build the student with "
                f"num_classes={needed}."
            )
        if self.teacher is None:
            return
        teacher = self.teacher(batch)
        if teacher.logits.shape[1] != classes:
            raise ValueError(
                f"The teacher has {teacher.logits.shape[1]} classes and the student {classes}: logit losses compare "
                "them class by class. Set teacher_name_or_path to one that was trained on the student's classes."
            )
        for name, loss in self.distiller.losses.items():
            if loss.views == 2 and student.strong is None:
                raise ValueError(
                    f"The loss '{name}' needs two views of every image: the batches must hold 'pixel_values_strong' "
                    f"beside 'pixel_values', but hold {sorted(batch)}."
                )
            loss.setup(student, teacher)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # Optimizer, DDP and compile must cover student and losses together: two modules prepared side by side train
        # the losses wrongly. So the distiller stands in for the student while Trainer prepares "the model".
        self.distiller.student = student = self.model
        self.model = self.model_wrapped = self.distiller
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.model = student
        self.callback_handler.model = student
        self._term_sums, self._term_count, self._images_seen = None, 0, 0
        self._clock = time.perf_counter()
        return prepared

    def set_initial_training_values(self, args, dataloader):
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1]
        return values

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All parameters, or the matrices and kernels that the student does not exempt (`no_weight_decay`)."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        exempt = set()
        for prefix, module in model.named_modules():
            if isinstance(getattr(type(module), "no_weight_decay", None), Callable):
                exempt |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return [name for name, value in model.named_parameters() if value.ndim > 1 and name not in exempt]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer_class is torch.optim.SGD:
            kwargs["fused"] = True  # one kernel over all parameters in place of three for each
        return optimizer_class, kwargs

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None and self.args.lr_milestones:
            steps = [round(epoch * self._steps_per_epoch) for epoch in self.args.lr_milestones]
            self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(
                optimizer or self.optimizer, steps, self.args.lr_gamma
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- A training step: nothing here may wait for the device ---------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the weighted terms; each is also accumulated on the device, to be logged under its name."""
        progress = torch.full((), self.state.epoch or 0.0, device=inputs["labels"].device)
        batch = {**inputs, "progress": progress}
        teacher = self.teacher(batch) if self.distiller.losses else None
        terms = model(batch, teacher)
        values = torch.stack(list(terms.values()))
        self._count(list(terms), values.detach(), len(inputs["labels"]))
        loss = values.sum()
        return (loss, terms) if return_outputs else loss

    def _count(self, names: list[str], values: Tensor, images: int) -> None:
        if self._term_sums is None:
            self._term_names, self._term_sums = names, torch.zeros_like(values)
        self._term_sums += values
        self._term_count += 1
        self._images_seen += images

    def _get_grad_norm(self, model, grad_norm=None):
        # Trainer measures the norm even where nothing is clipped, which costs a pass over all gradients.
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer's estimate (6 x parameters x inputs) is wrong for convolutions and costs a module walk

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_count:
            logs.update(self._drain_log())
        super().log(logs, start_time)

    def _drain_log(self) -> dict[str, float]:
        """Means since the last log, over all processes; the only place where a training step's values are read."""
        means = self.accelerator.reduce(self._term_sums / self._term_count, reduction="mean")
        logs = dict(zip(self._term_names, means.tolist(), strict=True))
        logs |= {name: value.item() for name, value in self.distiller.metrics().items()}
        now = time.perf_counter()
        logs["images_per_second"] = self._images_seen * self.args.world_size / (now - self._clock)
        self._term_sums, self._term_count, self._images_seen, self._clock = None, 0, 0, now
        return logs

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        started = time.perf_counter()
        if self.args.world_size > 1:
            # Every rank has seen other images since the last forward: all evaluate with rank 0's BatchNorm statistics.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        self._keep_logits = description == "Prediction"
        self._teacher_memory = self._memory_of(dataloader.dataset)
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        self._clock += time.perf_counter() - started  # images_per_second speaks of training alone
        return output

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Cross-entropy, predictions, labels. `predict()` gets logits; `evaluate()` only the best classes of student
        and teacher, so that ImageNet's logits need not be gathered."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with self.accelerator.autocast():
            logits = at_least_float32(logits_of(model, inputs["pixel_values"]))
        if prediction_loss_only or self._keep_logits or labels is None:
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return loss, None if prediction_loss_only else logits, labels
        ranked = logits.topk(min(5, logits.shape[1])).indices
        # One loss an image: Trainer's mean over batches would count twice the images that pad a rank's last batch.
        losses = F.cross_entropy(logits, labels, reduction="none")
        teacher = () if self.teacher is None else (self._teacher_choice(inputs),)
        return None, (ranked, losses, *teacher), labels

    def _memory_of(self, dataset) -> Tensor | None:
        """What the teacher chose in earlier evaluations of an unaugmented `ImageDataset`, (N,), -1 where not known.

        The teacher never changes, and is often several times the student: asking it once saves most of the time of
        every later evaluation.
        """
        source = _image_source(dataset)
        if source is None or not isinstance(source.transform, NoAugmentation):
            return None
        unknown = torch.full((len(source),), -1, device=self.args.device)
        return self._teacher_memories.setdefault(source, unknown)

    def _teacher_choice(self, inputs: dict[str, Tensor]) -> Tensor:
        """The teacher's most probable class for each image, (B,)."""
        memory, index = self._teacher_memory, inputs.get("index")
        if memory is not None and (memory[index] >= 0).all():
            return memory[index]
        choice = self.teacher({"pixel_values": inputs["pixel_values"]}).logits.argmax(dim=1)
        if memory is not None:
            memory[index] = choice
        return choice

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, exported_state_dict(self.model) if state_dict is None else state_dict)
        if self.args.should_save:  # Trainer's pickle of the arguments holds the Hub token
            os.remove(os.path.join(output_dir or self.args.output_dir, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.distiller.losses.state_dict()
        if state and self.args.should_save:
            safetensors.torch.save_file(state, os.path.join(output_dir, LOSSES_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.distiller.losses.state_dict():
            self.distiller.losses.load_state_dict(safetensors.torch.load_file(os.path.join(checkpoint, LOSSES_NAME)))


def _check_roles(model: nn.Module, teacher, losses: nn.ModuleDict, args: DistillationConfig) -> None:
    """Raises ValueError where teacher, student and losses cannot work together."""
    if losses and teacher is None:
        raise ValueError(f"The losses {sorted(losses)} need a teacher: set teacher_name_or_path, or remove them.")
    if not losses and args.ce_weight == 0:
        raise ValueError("Nothing to train on: ce_weight is 0 and there are no losses.")
    if teacher is not None and model is (teacher.model if isinstance(teacher, Teacher) else teacher):
        raise ValueError("Student and teacher are the same object: the teacher is frozen, so pass a copy.")


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics from what `prediction_step` gives: logits (N, C), or ranked classes (N, K) and losses (N,), with the
    teacher's choice (N,) where there is one."""
    given, labels = prediction.predictions, prediction.label_ids
    if not isinstance(given, tuple):
        return ImageClassificationMetrics().compute(predictions=np.argsort(-given, axis=1)[:, :5], references=labels)
    ranked, losses, *teacher = given
    metrics = ImageClassificationMetrics().compute(
        predictions=ranked, references=labels, teacher=teacher[0] if teacher else None
    )
    return metrics | {"loss": losses.mean().item()}
