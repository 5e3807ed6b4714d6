"""`DistillationTrainer`: transformers' Trainer with a teacher and distillation losses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, ProgressCallback, set_seed
from transformers.utils import logging

from ..data import ImageSource, StreamingImageDataset, collate_batch
from ..data.subsets import image_source, training_labels
from ..errors import HfkdError
from ..losses import DistillationLoss, build_losses
from ..names import hub_id, public_name
from ..networks.class_matching import class_names_of
from ..networks.features import remove_taps, settle_layers
from ..networks.gradient_checkpointing import use_gradient_checkpointing
from ..networks.loading import as_teacher, wrap_timm
from ..networks.simkd_rebuild import with_teacher_classifier
from ..networks.teacher import Teacher, TeacherEnsemble, check_placement
from ..recipe.arguments import DistillationConfig
from ..runs.folder import environment
from ..teacher_cache.teacher import CachedTeacher
from .callbacks import ProgressLines, SetEpoch, UpdateAverage
from .checks import check_ensemble, check_last_batch, check_roles
from .distiller import Distiller
from .evaluation import EvaluatingTrainer
from .metrics import compute_metrics
from .preemption import StopOnSigterm
from .results import ResultsWriter
from .term_log import UNLOGGED_NAME

logger = logging.get_logger(__name__)


class DistillationTrainer(EvaluatingTrainer):
    """Trains a student on the labels and on what a teacher says of the same images.

    `model` stays the student, so that saving, loading the best checkpoint, pushing and callbacks see a plain
    transformers model; what is prepared (optimizer, DDP, torch.compile) is the `Distiller` around it, which also
    holds the losses. Their state is part of every checkpoint and never of the exported student.

    Args:
        model: the student: a transformers image classifier, a timm model (`trainer.model` is then transformers'
            wrapper around it) or a module that returns logits (B, C).
        teacher: a `Teacher` (see `load_teacher`) or a model, which is frozen in place; a list of them is an ensemble.
            A `CachedTeacher` reads what one said before. None: labels alone.
        args: the `DistillationConfig`.
        train_dataset, eval_dataset: a data set of `hfkd.data`, or any other whose batches hold `pixel_values`
            (B, 3, H, W) and `labels` (B,).
        losses: in place of `args.losses`; values may also be `DistillationLoss` instances.
        model_init: in place of `model`, a function that makes a student, which `hyperparameter_search` needs: every
            trial, and every `train()`, begins with a fresh student and fresh losses, of `args.losses` as the trial has
            set them. The teacher stays.
        **kwargs: everything else that `Trainer` takes.

    `evaluate()` gives `eval_loss` (cross-entropy), `eval_top1`, `eval_top5` and, with a teacher, `eval_agreement`
    (how often both choose the same class) and `eval_teacher_top1`, in percent. A distilled DeiT or PiT of timm trains
    its class head by the cross-entropy and its distillation head by the losses that read logits; evaluation and the
    exported student average the two. Where a loss changes the student (SimKD), `trainer.model` is another network, made
    of a copy of `model`. With `ema_decay` what is evaluated and exported is the average over the steps.

    Raises:
        ValueError: before training starts, if losses, networks and data do not fit one another.
    """

    # compute_loss returns a mean over its batch: Trainer divides it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        teacher: Teacher | TeacherEnsemble | CachedTeacher | nn.Module | Sequence[Teacher | nn.Module] | None = None,
        args: DistillationConfig | None = None,
        *,
        train_dataset=None,
        eval_dataset=None,
        losses: Mapping[str, dict[str, Any] | DistillationLoss] | None = None,
        model_init: Callable[..., nn.Module] | None = None,
        **kwargs,
    ):
        args = args or DistillationConfig(output_dir="trainer_output")
        if args.n_gpu > 1:
            logger.warning("Several GPUs are visible and this process uses one: `accelerate launch` uses all of them.")
            args._n_gpu = 1
        self.model_init = model_init
        if (model is None) == (model_init is None):
            raise HfkdError("Give a model, or model_init, which makes one: one of the two.")
        if model_init is not None:
            model = self._first_student(losses, args.seed)
        losses = build_losses(args.losses if losses is None else losses, args.logit_standardization)
        check_roles(model, teacher, losses, args)
        self.teacher = as_teacher(teacher, args.logit_standardization)
        model = self._fitted(model, losses, args, train_dataset, eval_dataset)
        if isinstance(train_dataset, StreamingImageDataset):  # Trainer asks for its length at once
            train_dataset.shard(args.process_index, args.world_size, args.train_batch_size, args.dataloader_drop_last)
        kwargs.setdefault("data_collator", collate_batch)
        kwargs.setdefault("compute_metrics", compute_metrics)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

        if model_init is not None:  # Trainer takes one or the other
            self.model_init = model_init
            self._validate_args()
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressLines)
        self.results = ResultsWriter()
        self.results.facts = {"recipe": None, "dataset": None}  # which `run` knows
        self.add_callback(self.results)
        self.stop_on_sigterm = StopOnSigterm()
        self.add_callback(self.stop_on_sigterm)
        self._begin(losses)

    # ---- One run: the only one, or a trial of a search -----------------------------------------------------------

    def _first_student(self, losses, seed: int) -> nn.Module:
        if losses is not None:
            raise HfkdError("With model_init every training builds its own losses: give them as args.losses.")
        set_seed(seed)
        return self.call_model_init()

    def _fitted(self, model: nn.Module, losses: nn.ModuleDict, args, train_dataset, eval_dataset) -> nn.Module:
        """The student that losses and data ask for, of the one given."""
        remove_taps(model)  # an earlier trainer's
        source = image_source(train_dataset)
        if hasattr(model, "pretrained_cfg"):  # a bare timm model
            model = _wrapped(model, source)
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.fit(source, losses, args)
        set_seed(args.seed)  # of SimKD's projector, whether or not a teacher has just been loaded
        dataset = eval_dataset if train_dataset is None else train_dataset
        model = with_teacher_classifier(model, self.teacher, losses, image_source(dataset))
        return model.to(memory_format=torch.channels_last) if args.channels_last else model

    def _begin(self, losses: nn.ModuleDict) -> None:
        """Whatever belongs to one run: made of `self.model` and these losses, in the place of an earlier run's."""
        args = self.args
        set_seed(args.seed)  # of what the losses build, and of the training
        if isinstance(self.model, PreTrainedModel):
            # Else transformers saves some of its own models under former parameter names, which `from_pretrained`
            # converts and Trainer, on resuming or loading the best, does not: it leaves the weights as they are.
            self.model._weight_conversions = []
        # Before the losses tap the student: a copy would carry their hooks along.
        self.average = None if args.ema_decay is None else ModelEmaV3(self.model, args.ema_decay)
        self.pop_callback(UpdateAverage)
        if self.average is not None:
            self.add_callback(UpdateAverage(self.average, self.model))
        if args.gradient_checkpointing:
            use_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs or {})
        if self.teacher is not None:
            self._prepare_teacher(losses)
        self.distiller = Distiller(self.model, losses, args.ce_weight)
        self.results.facts |= self._facts(losses)
        self.results.rows = []
        self._term_names: list[str] = []
        self._start_counting()
        self._mixup: Mixup | None = None
        cache = self.teacher.files if isinstance(self.teacher, CachedTeacher) else None
        self.pop_callback(SetEpoch)
        self._place_data(max([loss.views for loss in losses.values()], default=1), cache)
        self._dry_run()
        if isinstance(self.train_dataset, Sized) and not isinstance(self.train_dataset, IterableDataset):
            check_last_batch(losses, len(self.train_dataset), args)
        self.distiller.to(args.device)
        if args.torch_compile:
            self._prepare_to_compile()

    def _hp_search_setup(self, trial):
        # Trainer calls it in every `train()`: model_init has made a student, and then it sets what the trial says.
        super()._hp_search_setup(trial)
        if self.model_init is None:
            return
        args = self.args
        losses = build_losses(args.losses, args.logit_standardization)
        check_roles(self.model, self.teacher, losses, args)
        self.model = self._fitted(self.model, losses, args, self.train_dataset, self.eval_dataset)
        self.model_wrapped = self.model
        self._begin(losses)

    # ---- Before training ---------------------------------------------------------------------------------------

    def _facts(self, losses: nn.ModuleDict) -> dict[str, Any]:
        """What `results.json` says of the run beside what was measured; `run.train` adds what only a recipe knows."""
        args, teacher = self.args, self.teacher
        name_or_path = getattr(self.model, "name_or_path", "")  # of a transformers model
        origins = [hub_id(name_or_path), *(member.hub_id for member in (teacher.members if teacher else []))]
        cached = {"teacher_cache": teacher.settings()} if isinstance(teacher, CachedTeacher) else {}
        return {
            "role": self.export_name,
            "student": public_name(name_or_path, self.model),
            "teacher": teacher.name if teacher else None,
            "base_models": [origin for origin in dict.fromkeys(origins) if origin],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "teacher_parameters": teacher.parameter_count() if teacher else None,
            **cached,
            "losses": {name: loss.settings() for name, loss in losses.items()},
            "logit_standardization": args.logit_standardization,
            "ce_weight": args.ce_weight,
            "published_top1": args.published_top1,
            "exported": "best" if args.load_best_model_at_end else "last",
            "devices": f"{args.world_size} x {args.device.type}",
            "seed": args.seed,
            **environment(),
        }

    def _prepare_teacher(self, losses: nn.ModuleDict) -> None:
        """Teacher and losses in the precision of the run, and the teacher's layers that the losses read."""
        args = self.args
        if not isinstance(self.teacher, CachedTeacher):  # which has no network
            check_placement(self.teacher, args.world_size, args.torch_compile)
            settle_layers(losses.values(), self.model, self.teacher.members[0].model)
        autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        for loss in losses.values():
            loss.autocast_dtype = autocast_dtype
        layers = [layer for loss in losses.values() for layer in loss.teacher_layers]
        self.teacher.prepare(
            args.device, autocast_dtype, args.channels_last, self._input_spec(), layers, args.shard_teacher
        )
        check_ensemble(self.teacher, losses, args)

    def _prepare_to_compile(self) -> None:
        # Else a network's code may be that of an earlier one of its class, compiled with other taps.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        # What taps record is not recorded again where gradient checkpointing runs a layer again: see `recomputing`.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        if self.teacher is not None:
            self.teacher.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    def _dry_run(self) -> None:
        """One forward of two images: do the classes agree, and which shapes will the losses see?"""
        dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        source = image_source(dataset)
        batch = self._two_images(dataset, source)
        if batch is None:
            return
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self._autocast():
            student = self.distiller.predict(batch)
        self.model.train(was_training)
        classes = student.logits.shape[1]
        needed = int(batch["labels"].max()) + 1 if source is None else source.num_classes
        if classes < needed:
            raise HfkdError(
                f"The student has {classes} classes and the data set {needed}: build the student with "
                f"num_classes={needed}."
            )
        if self.args.mixes:
            self._mixup = Mixup(self.args.mixup, self.args.cutmix, label_smoothing=0.0, num_classes=classes)
        if self.teacher is None:
            return
        names = class_names_of(self.model) if source is None else source.class_names  # the labels are in its order
        self.teacher.align_classes(names if len(names) == classes else list(map(str, range(classes))), batch)
        teacher = self.teacher(batch)
        for name, loss in self.distiller.losses.items():
            if loss.views == 2 and student.strong is None:
                raise HfkdError(
                    f"The loss '{name}' needs two views of every image: the batches must hold 'pixel_values_strong' "
                    f"beside 'pixel_values', but hold {sorted(batch)}."
                )
            try:
                if loss.needs_index and self.train_dataset is not None:
                    loss.setup_rows(training_labels(self.train_dataset))
                loss.setup(student, teacher)
            except ValueError as error:
                raise HfkdError(f"losses.{name}: {error}") from error

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._start_counting()
        return prepared

    # ---- A training step: nothing here may wait for the device ---------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the weighted terms; each is also accumulated on the device, to be logged under its name."""
        progress = torch.full((), self.state.epoch or 0.0, device=inputs["labels"].device)
        batch = {**inputs, "progress": progress}
        if self._mixup is not None:
            # numpy's generator says how: Trainer's checkpoints hold its state, and no data set of ours touches it.
            batch["pixel_values"], batch["labels"] = self._mixup(batch["pixel_values"], batch["labels"])
        teacher = self.teacher(batch) if self.distiller.losses else None
        with self._autocast():
            terms = model(batch, teacher)
        values = torch.stack(list(terms.values()))
        self._count(list(terms), values.detach(), len(inputs["labels"]))
        loss = values.sum()
        return (loss, terms) if return_outputs else loss

    def _start_counting(self) -> None:
        """What the next log is made of, from now on."""
        self._term_sums: Tensor | None = None
        self._term_count = self._images_seen = 0
        self._clock = time.perf_counter()

    def _count(self, names: list[str], values: Tensor, images: int) -> None:
        if self._term_sums is None:
            self._term_names, self._term_sums = names, torch.zeros_like(values)
        self._term_sums += values
        self._term_count += 1
        self._images_seen += images

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_count:
            logs.update(self._drain_log())
        super().log(logs, start_time)

    def _drain_log(self) -> dict[str, float]:
        """Means since the last log, over all processes; the only place where a training step's values are read."""
        means = self.accelerator.reduce(self._term_sums / self._term_count, reduction="mean")
        logs = dict(zip(self._term_names, means.tolist(), strict=True))
        logs |= {name: value.item() for name, value in self.distiller.metrics().items()}
        logs |= self._skipped("skipped_images", self.train_dataset)
        seconds = time.perf_counter() - self._clock
        logs["images_per_second"] = self._images_seen * self.args.world_size / seconds
        self._start_counting()
        return logs

    def _unlogged(self) -> dict[str, Any]:
        """What each process has added up since the last log: checkpoints hold it, so that the next log of a resumed
        run is that of the undisturbed one."""
        if not self._term_count:
            return {}
        sums = self.accelerator.gather(torch.stack([self._tr_loss, *self._term_sums])[None]).tolist()
        since, count = self._globalstep_last_logged, self._term_count
        return {"since": since, "count": count, "terms": self._term_names, "sums": sums}

    def _restore_unlogged(self, unlogged: dict[str, Any]) -> None:
        if not unlogged:
            return
        sums = torch.tensor(unlogged["sums"], device=self.args.device)
        # Of as many processes each takes up its own, of another number all the mean.
        own = sums[self.args.process_index] if len(sums) == self.args.world_size else sums.mean(dim=0)
        self._globalstep_last_logged, self._term_count = unlogged["since"], unlogged["count"]
        self._tr_loss.copy_(own[0])
        self._term_names, self._term_sums = unlogged["terms"], own[1:].clone()

    def _run_epoch(self, **kwargs):
        checkpoint = kwargs["resume_from_checkpoint"]
        if checkpoint is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            self._restore_unlogged(json.loads(Path(checkpoint, UNLOGGED_NAME).read_text()))
        return super()._run_epoch(**kwargs)


def _wrapped(model: nn.Module, source: ImageSource | None) -> PreTrainedModel:
    """A bare timm model in transformers' wrapper, its classes named by the data set as far as that has names."""
    names = [] if source is None else source.class_names
    return wrap_timm(model, [*names, *map(str, range(len(names), model.num_classes))][: model.num_classes])
