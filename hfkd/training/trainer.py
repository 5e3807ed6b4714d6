"""`DistillationTrainer`: transformers' Trainer with a teacher and distillation losses.

Every method of Trainer that hfkd overrides stands in this file, once. What it does beyond Trainer lies in the objects
that it holds: the log of terms, the teacher's memory, checkpoints, exports, pushes and the backend. `upstream.py` lists
the names of other libraries that all of this relies on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, has_length
from transformers.utils import logging

from ..data import StreamingImageDataset, collate_batch
from ..data.image_dataset import BATCH_ENTRIES
from ..data.subsets import image_source
from ..errors import HfkdError
from ..losses import DistillationLoss, build_losses
from ..losses.standardize import at_least_float32
from ..networks.features import find_classifier
from ..networks.gradient_checkpointing import use_gradient_checkpointing
from ..networks.headless import is_headless
from ..networks.teacher import Teacher, TeacherEnsemble
from ..networks.wrapping import exported_state_dict
from ..recipe.checks import AUTO
from ..recipe.config import DistillationConfig
from ..runs.writing import finite_or_none, use_umask
from ..teacher_cache.choices import KeptChoices, kept_choices
from ..teacher_cache.filling import FillingTeacher, why_not_kept
from ..teacher_cache.identity import teacher_facts
from ..teacher_cache.teacher import CachedTeacher
from .backends import backend_of
from .callbacks import (
    ContinueLog,
    EndWhereDone,
    EpochLines,
    MoveRanges,
    ProgressLines,
    SetEpoch,
    UpdateAverage,
    place_tensorboard,
)
from .checkpoints import WEIGHTS_PATTERN, Checkpoints, changed_for_now, check_best
from .checks import (
    asks_for_best,
    check_best_metric,
    check_given_optimizer,
    check_metric_settings,
    check_types,
    smallest_batch,
    unlabelled_images,
)
from .compiling import CompileChoice
from .distiller import Distiller
from .divergence import Divergence
from .dry_run import check_single_image, dry_run
from .early_stopping import EarlyStopping
from .evaluation import TeacherMemory, mean_cross_entropy, own_forward, ranked_predictions
from .exports import Exports
from .freezing import freeze
from .label_loss import check_label_loss, cross_entropy
from .loaders import (
    check_batch,
    claim_images,
    data_sets,
    evaluation_share,
    first_images,
    first_set,
    place_images,
    skipped_images,
    stream_loader,
    without_signals,
)
from .measuring import Measuring
from .metrics import EvaluationMetrics, names_of_users, own_names
from .optimization import (
    decayed_parameter_names,
    layer_scales,
    lomo_looked_up_once,
    multi_step_schedule,
    optimizer_settings,
    scale_learning_rates,
)
from .preemption import StopOnSigterm
from .probes import KNN, between_probes
from .pushes import Pushes
from .results import ResultsWriter, run_facts
from .roles import cast_roles, check_settings
from .run_block import RunBlock
from .student import (
    batch_spec,
    check_layer_names,
    fit_student,
    prepare_teacher,
    tell_losses,
)
from .teacher_report import TeacherReport
from .term_log import TermLog
from .unlabelled import (
    TermMetrics,
    evaluated_batch,
    has_labels,
    measures_terms,
    total_of,
    uncounted_label,
)

logger = logging.get_logger(__name__)


class DistillationTrainer(Trainer):
    """Trains a student on the labels and on the outputs of a teacher for the same images.

    `model` stays the student, so that saving, loading the best checkpoint, pushing and callbacks see a plain
    transformers model. What is prepared (optimizer, DDP, torch.compile) is the `Distiller` around it, which also holds
    the losses. Their state is part of every checkpoint and never of the exported student.

    Args:
        model: the student: a transformers image classifier, a timm model (`trainer.model` is then transformers'
            wrapper around it), a module that returns logits (B, C), or a name that `load_student` takes. Of a name, or
            of a timm model with `num_classes` 0, it is a backbone where nothing trains a classifier.
        teacher: a `Teacher` (see `load_teacher`), a model, which is left as it was, or a name that `load_teacher`
            takes; a list of them is an ensemble. A `CachedTeacher` reads stored logits. None: labels alone.
        args: the `DistillationConfig`.
        train_dataset, eval_dataset: a data set of `hfkd.data`, or any other whose batches hold `pixel_values`
            (B, 3, H, W) and `labels` (B,), or whose items are pairs of image and label. Of several evaluation sets in
            a dictionary, the first one's top-1 is that of `results.json`, where it has one. Images without labels must
            be a data set of `hfkd.data`.
        losses: in place of `args.losses`; values may also be `DistillationLoss` instances.
        model_init: in place of `model`, a function that makes a student, which `hyperparameter_search` needs. Every
            trial, and every `train()`, begins with a fresh student and fresh losses, those of `args.losses` as the
            trial has set them. The teacher stays.
        teacher_cache_limit: GiB that the outputs of all teachers for training images may take beside the cache of
            `datasets`, where they are kept for later trainings; 0 keeps none. The student is the same to the bit.
        **kwargs: everything else that `Trainer` takes. `compute_metrics` gets logits and labels, and adds to hfkd's own
            figures. `compute_loss_func` takes the place of the cross-entropy with the labels in training.

    Attributes:
        distiller: student and losses, the one module that is trained.
        average: moving average of the student (`ema_decay`), or None; it is evaluated and exported.
        num_classes: the student's number of classes, 0 without a classifier; None without data.
        results: rows and facts of `results.json`.
        exports: the exported model on disk.
        run_block: what is printed before training.
        stop_on_sigterm: ends training at SIGTERM, SIGINT or SIGHUP, or when its `time_is_up` says so.

    `evaluate()` gives `eval_loss` (cross-entropy), `eval_top1`, `eval_top5` and, with a teacher, `eval_agreement`
    (share of images on which both choose the same class) and `eval_teacher_top1`, in percent. Of images without
    labels, or for a student without classes, it gives the loss terms, their sum as `eval_loss`, and `eval_agreement`.
    With `probe_every` also `eval_knn`, the top-1 of the nearest neighbours among the evaluation images. A distilled
    DeiT or PiT of timm trains its class head by the cross-entropy and its distillation head by the losses that read
    logits; evaluation and the exported student average the two. Where a loss changes the student (SimKD),
    `trainer.model` is another network, made of a copy of `model`.

    Raises:
        HfkdError: before training starts, if losses, networks and data do not fit one another.
    """

    # What Trainer's own hints leave open or say otherwise.
    args: DistillationConfig
    model: nn.Module
    model_init: Callable[..., nn.Module] | None  # type: ignore[assignment]  # Trainer's: only PreTrainedModel
    train_dataset: Any
    eval_dataset: Any
    optimizer: torch.optim.Optimizer  # None before `create_optimizer`
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None  # type: ignore[assignment]  # Trainer's: only LambdaLR
    _signature_columns: list[str]  # type: ignore[assignment]  # Trainer's: only None
    hub_model_id: str | None  # type: ignore[assignment]  # Trainer's: only None

    def __init__(
        self,
        model: nn.Module | str | None = None,
        teacher: Teacher
        | TeacherEnsemble
        | CachedTeacher
        | nn.Module
        | str
        | Sequence[Teacher | nn.Module | str]
        | None = None,
        args: DistillationConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        losses: Mapping[str, Mapping[str, Any] | DistillationLoss | None] | None = None,
        model_init: Callable[..., nn.Module] | None = None,
        teacher_cache_limit: float = 0.0,
        **kwargs: Any,
    ):
        # The order matters. Student, teacher and losses are checked first, because Trainer's constructor creates
        # repositories and folders. Trainer must get the final student, so SimKD rebuilds it before. Taps, the average
        # and the dry run come last (`_begin`): they need the device, which Trainer's constructor settles.
        args = args or DistillationConfig(output_dir="trainer_output")
        check_types(model, args)
        check_label_loss(kwargs.get("compute_loss_func"), args.losses if losses is None else losses, args)
        if args.n_gpu > 1:
            logger.warning("Several GPUs are visible and this process uses one: `accelerate launch` uses all of them.")
            args._n_gpu = 1
        self.model_init = model_init
        if (model is None) == (model_init is None):
            raise HfkdError("Give a model, or model_init, which makes one: one of the two.")
        if model is None:
            model = self._first_model(losses, args)
        given = args.losses if losses is None else losses
        roles = cast_roles(model, teacher, given, args, train_dataset, eval_dataset)
        self.teacher = roles.teacher
        kwargs["processing_class"] = kwargs.get("processing_class") or roles.processor
        if isinstance(train_dataset, StreamingImageDataset):  # Trainer asks for its length at once
            train_dataset.shard(args.process_index, args.world_size, args.train_batch_size, args.dataloader_drop_last)
        self.run_block = RunBlock(self, roles.weights)
        self.results = ResultsWriter("eval_loss" if roles.by_terms else "eval_top1")
        self.divergence = Divergence(args, self.results)
        self.exports = Exports(args, self.results)
        # Before Trainer's constructor, which calls init_hf_repo. The reference is weak: a trainer in a circle of
        # references would outlive its last use, and its loaders' workers with it.
        trainer = weakref.proxy(self)
        self.pushes = Pushes(args, self.exports, on_begin=lambda: trainer._tell_of_push())
        self.stop_on_sigterm = StopOnSigterm()
        self.term_log = TermLog()
        kwargs["data_collator"] = kwargs.get("data_collator") or collate_batch
        self._label_loss = kwargs.pop("compute_loss_func", None)
        # Trainer's own label smoothing, which nothing here calls, would need a model of transformers.
        with changed_for_now(args, label_smoothing_factor=0.0):
            super().__init__(roles.student, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

        # compute_loss returns a mean over its batch, which Trainer divides by the number of accumulated batches: unless
        # the model counts the labels of all of them, or a user's function, which it is not to know, may do so.
        self.model_accepts_loss_kwargs = False
        self._signature_columns = list(BATCH_ENTRIES)  # what remove_unused_columns keeps, whatever the student takes
        if model_init is not None:  # Trainer takes one or the other
            self.model_init = model_init
            self._validate_args()
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressLines if sys.stdout.isatty() else EpochLines)
        place_tensorboard(self.callback_handler.callbacks, Path(str(args.output_dir), "tensorboard"))
        self.results.facts = {"recipe": None, "dataset": None}  # a command that knows them sets them
        self.checkpoints = Checkpoints(args, self.accelerator.wait_for_everyone)
        self._teacher_cache_limit = teacher_cache_limit
        kept = self._kept_choices()
        self._continue_log = ContinueLog(self, self.term_log)
        self._measuring: Measuring | None = None  # the pass under way
        self._steps_per_epoch = 1  # known once training begins, when a schedule that a user has created is replaced
        self.results.first_set = next(iter(eval_dataset), None) if isinstance(eval_dataset, dict) else None
        self._whole_state: dict[str, Tensor] | None = None
        self._add_own_callbacks()
        self._begin(roles.losses)
        comparable = self.teacher is not None and self.teacher.shares_classes
        self.teacher_memory = TeacherMemory(self.teacher if comparable else None, args.device, kept)
        check_metric_settings(self.model, eval_dataset, args)
        check_given_optimizer(self.optimizer, self.distiller, args)
        if args.probe_every is not None:
            find_classifier(self.model)
        if asks_for_best(args) and eval_dataset is not None:
            check_best_metric(args.metric_for_best_model, eval_dataset, self._metric_names())

    def _first_model(self, losses: Any, args: DistillationConfig) -> nn.Module:
        """Return the model that `model_init` makes before the first training."""
        if losses is not None:
            raise HfkdError("With model_init every training builds its own losses: give them as args.losses.")
        set_seed(args.seed)
        return self.call_model_init()

    def _kept_choices(self) -> KeptChoices | None:
        """Return where the teacher's classes are kept. Call it before `_begin`, which rounds the teacher's weights."""
        keeps = self.args.keep_teacher_evaluation or self._teacher_cache_limit > 0
        self._teacher_facts = teacher_facts(self.teacher, self.args) if keeps else None
        return kept_choices(self.teacher, self._teacher_facts, self.args)

    def _add_own_callbacks(self) -> None:
        # Block and report come before the clocks of the others.
        callbacks = (
            self.run_block,
            TeacherReport(self),
            self._continue_log,
            *([EarlyStopping(self.args, self.results)] if self.args.early_stopping_patience else []),
            self.results,
            self.stop_on_sigterm,
            self.pushes,
            EndWhereDone(),
        )
        for callback in (*callbacks, self.divergence):  # the last one takes back a checkpoint that others ask for
            self.add_callback(callback)

    @property
    def has_classifier(self) -> bool:
        """False for a student that is a backbone, which has no top-1."""
        return not is_headless(self.model)

    # ---- One run: the only one, or a trial of a search -------------------------------------------------------------

    def _begin(self, losses: nn.ModuleDict) -> None:
        """Set up everything that belongs to one run, in place of an earlier run's."""
        args = self.args
        set_seed(args.seed)  # of what the losses build, and of the training
        if isinstance(self.model, PreTrainedModel):
            # Else transformers saves some of its own models under former parameter names, which `from_pretrained`
            # converts and Trainer, on resuming or loading the best, does not: it leaves the weights as they are.
            self.model._weight_conversions = []  # type: ignore[assignment]  # which transformers does not declare
        check_layer_names(self.model, args)
        frozen_norms = freeze(self.model, args.freeze or [])
        # Before the losses tap the student: a copy would carry their hooks along.
        self.average = None if args.ema_decay is None else ModelEmaV3(self.model, args.ema_decay, use_warmup=True)
        self.pop_callback(UpdateAverage)
        if self.average is not None:
            self.add_callback(UpdateAverage(self.average, self.model))
        self.pop_callback(MoveRanges)
        if args.quantize == "int8":
            self.add_callback(MoveRanges(self.model))
        if args.gradient_checkpointing:
            settings: Any = args.gradient_checkpointing_kwargs  # a mapping or None once args is built
            use_gradient_checkpointing(self.model, settings or {})
        autocast_dtype = tell_losses(losses, self.model, self.teacher, args)
        if self.teacher is not None:
            images = batch_spec(self.train_dataset, first_set(self.eval_dataset), self.model)
            prepare_teacher(self.teacher, losses, args, images, autocast_dtype)
        own = self._label_loss, cross_entropy(args, self.train_dataset)
        added = unlabelled_images(self.train_dataset)
        self.distiller = Distiller(self.model, losses, args.ce_weight, *own, frozen_norms, added)
        self.results.facts |= run_facts(self.exports.name, self.model, self.teacher, losses, args)
        if self._label_loss is not None:
            kind = type(self._label_loss).__name__
            self.results.facts["label_loss"] = getattr(self._label_loss, "__name__", kind)
        self.results.rows = []
        self.divergence.start()
        self.term_log.start()
        self._place_images(losses)
        batch = self._dry_run()
        self.distiller.to(args.device)
        if smallest_batch(self.train_dataset, losses, args) == 1 and batch is not None:
            check_single_image(self.distiller, self.teacher, batch, self.backend.autocast())
        self._keep_outputs(losses)
        self._choose_compiling()
        if args.torch_compile and self.compile_choice is None and self.teacher is not None:
            self.teacher.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)

    def _choose_compiling(self) -> None:
        """Have the first steps of `train()` choose, where the user leaves it to them."""
        self.pop_callback(CompileChoice)
        self.compile_choice: CompileChoice | None = None
        if self.args.torch_compile == AUTO:
            mean = functools.partial(self.accelerator.reduce, reduction="mean")
            self.compile_choice = CompileChoice(self.teacher, self.args, self.results, mean)
            self.add_callback(self.compile_choice)

    def _place_images(self, losses: nn.ModuleDict) -> None:
        views: list[Any] = [loss.views for loss in losses.values()]
        cache = self.teacher.files if isinstance(self.teacher, CachedTeacher) else None
        eval_sets = data_sets(self.eval_dataset)
        self._views_and_cache = max(views, default=1), cache
        images = place_images(self.train_dataset, eval_sets, *self._views_and_cache, self.args)
        self.pop_callback(SetEpoch)
        self._set_epoch = None if images is None else SetEpoch(images)
        if self._set_epoch is not None:
            self.add_callback(self._set_epoch)

    def _keep_outputs(self, losses: nn.ModuleDict) -> None:
        """Let what the teacher says in training be kept for later trainings, if that is wanted."""
        self._filling: FillingTeacher | None = None
        if self._teacher_cache_limit == 0 or self.teacher is None or not self.distiller.needs_teacher:
            return
        source, facts, limit = image_source(self.train_dataset), self._teacher_facts, self._teacher_cache_limit
        reason = why_not_kept(facts, losses.values(), source, self.args)
        self.run_block.cache = f"none, the teacher runs: {reason}"
        if reason is None:
            self._filling = FillingTeacher(self.teacher, source, facts, losses.values(), self.args, limit)
            self.run_block.cache = self._filling.describe(len(self.train_dataset))

    def _dry_run(self) -> dict[str, Tensor] | None:
        """Return the images of the dry run, on the device; None without a data set."""
        self._mixup: Mixup | None = None
        self.num_classes: int | None = None
        eval_set = first_set(self.eval_dataset)
        batch = self._first_images(eval_set if self.train_dataset is None else self.train_dataset)
        if batch is None:
            return None
        autocast = self.backend.autocast()
        classes = dry_run(self.distiller, self.teacher, batch, self.train_dataset, eval_set, autocast)
        self.num_classes = classes
        if self.args.mixes:
            source = image_source(self.train_dataset)
            mixed = classes if source is None else max(classes, source.num_classes)  # the student may have none
            self._mixes_labels = mixed > 0 and has_labels(self.train_dataset)
            self._mixup = Mixup(self.args.mixup, self.args.cutmix, label_smoothing=0.0, num_classes=max(1, mixed))
        return batch

    def _first_images(self, dataset) -> dict[str, Tensor] | None:
        if self.args.remove_unused_columns and isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset)
        batch = first_images(dataset, self.data_collator)
        if batch is None:
            return None
        check_batch(batch)
        return self._prepare_inputs(batch)

    def _metric_names(self) -> list[str] | None:
        """Return the names that an evaluation gives; None if a user's function does not tell from two images."""
        if self.args.prediction_loss_only:
            return ["loss"]
        probed = [] if self.args.probe_every is None else [KNN]
        if measures_terms(first_set(self.eval_dataset), self.model):
            return [*self._term_names(), *probed]
        own = [*own_names(with_teacher=self.teacher_memory.teacher is not None), *probed]
        if self.compute_metrics is None:
            return own
        batch: Any = self._first_images(first_set(self.eval_dataset))
        metrics = self._evaluation_metrics(keeps_logits=True)
        users = names_of_users(metrics, batch["labels"], self.args.batch_eval_metrics)
        return None if users is None else own + users

    def _term_names(self) -> list[str]:
        dataset = first_set(self.eval_dataset)
        metrics = TermMetrics(uncounted_label(dataset))
        with torch.no_grad(), self.distiller.evaluating(self.model):
            batch: Any = self._first_images(dataset)
            self._evaluated_terms(batch, metrics)
        return list(total_of(dict.fromkeys(metrics.names, 0.0)))

    def _hp_search_setup(self, trial):
        # Trainer calls it in every `train()`, after model_init has made a student. It sets the values of the trial, and
        # the losses depend on them.
        super()._hp_search_setup(trial)
        if self.model_init is None:
            return
        args = self.args
        losses = build_losses(args.losses, args.logit_standardization)
        check_label_loss(self._label_loss, losses, args)
        check_settings(self.model, self.teacher, losses, args, self.train_dataset)
        self.model = fit_student(
            self.model, self.teacher, losses, args, self.train_dataset, first_set(self.eval_dataset)
        )
        self.model_wrapped = self.model
        self._begin(losses)

    # ---- Training --------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as Trainer does, but resume only from checkpoints that are whole, and end at a signal.

        Args:
            resume_from_checkpoint: a folder, or True for the last whole checkpoint of `output_dir`.

        Raises:
            HfkdError: if there is no such checkpoint, or it does not fit this run.
            RunError: if a checkpoint or `results.json` cannot be written, where what was written before is whole; or
                if the run has diverged.
            SystemExit: with code 143 after SIGTERM, 130 after Ctrl-C and 129 after SIGHUP, once the step in hand is in
                a checkpoint.
        """
        checkpoint = self.checkpoints.find(resume_from_checkpoint, self.model)
        self._continue_log.checkpoint = checkpoint
        # A trial of a search leaves no checkpoint: SIGTERM ends it at once, and the search begins it again.
        listening = self.stop_on_sigterm.listening() if trial is None else contextlib.nullcontext()
        # With a limit of 1 Trainer would in the end remove the last checkpoint where another is the best.
        self._save_total_limit = limit = self.args.save_total_limit
        with listening, self.checkpoints.full_disk_explained(), lomo_looked_up_once(), self._compiling():
            with self._outputs_written(), changed_for_now(self.args, save_total_limit=None if limit == 1 else limit):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
        self.distiller.remove_taps()  # the trained model can be copied
        if self.average is not None:  # the exported student is what was evaluated
            self.model.load_state_dict(self.average.module.state_dict())
        if trial is None:
            self._exported_is_finite()  # it says if they are not: no log follows the last step
            if self.divergence.stops:
                raise self.divergence.error()
        if self.stop_on_sigterm.stopped:
            raise SystemExit(self.stop_on_sigterm.exit_code)
        return output

    @contextlib.contextmanager
    def _outputs_written(self) -> Iterator[None]:
        """Read the images as this trainer does, and write what the teacher has said, however the training ends."""
        claim_images(self.train_dataset, *self._views_and_cache)
        if self._filling is not None:
            self._filling.begin()
        try:
            yield
        finally:
            if self._filling is not None:  # another one in each trial of a search
                self._filling.write()

    def _exported_is_finite(self) -> bool:
        """Return whether the weights that an export writes are finite; all processes must call it."""
        exported = self.model if self.average is None else self.average.module
        return self.divergence.weights_are_finite(exported.state_dict().values(), self.state)

    def _compiling(self) -> contextlib.AbstractContextManager:
        """Return the context in which compiled networks run."""
        if not self.args.torch_compile:
            return contextlib.nullcontext()
        import torch._dynamo  # takes a second, and without torch_compile nobody needs it

        return torch._dynamo.config.patch(
            # Else a network's code may be that of an earlier one of its class, compiled with other taps.
            skip_nnmodule_hook_guards=False,
            # Taps do not record again where gradient checkpointing runs a layer again: see `recomputing`.
            skip_fwd_side_effects_in_bwd_under_checkpoint=True,
        )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.backend = backend_of(self.accelerator, self.args)
        # In its branches for FSDP and DeepSpeed Trainer takes `self.model` for what is sharded, which is the distiller,
        # and writes checkpoints that other runs cannot read. The plain branches do: accelerate shards in `prepare`.
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # Optimizer, DDP and compile must cover student and losses together: two modules prepared side by side train
        # the losses wrongly. So the distiller stands in for the student while Trainer prepares "the model".
        self.distiller.student = student = self.model
        self.backend.before_prepare(self.distiller)
        self.model = self.model_wrapped = self.distiller
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.model = student
        self.backend.after_prepare(self.distiller)
        self.callback_handler.model = student
        if resume_from_checkpoint is not None:
            self._resume(resume_from_checkpoint, max_steps, train_dataloader)
        return prepared

    def _resume(self, checkpoint: str, max_steps: int, train_dataloader: DataLoader) -> None:
        """Check the position of a checkpoint whose state is loaded, and take up what Trainer does not."""
        accumulated = self.args.gradient_accumulation_steps
        batches = len(train_dataloader) if has_length(train_dataloader) else max_steps * accumulated
        self.checkpoints.check_position(checkpoint, self.state, batches, self.train_dataset)
        self.checkpoints.continue_from(checkpoint, self.state)
        if self._set_epoch is not None and not self.args.ignore_data_skip:
            self._set_epoch.batches_to_skip = self.state.global_step % self._steps_per_epoch * accumulated

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:  # resumed at the last step; Trainer would take another one
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the sum of the weighted terms; nothing here may wait for the device."""
        device = inputs["labels"].device
        progress = torch.full((), self.state.epoch or 0.0, device=device)
        batch = {**inputs, "progress": progress, "step": torch.full((), self.state.global_step, device=device)}
        if self._mixup is not None:
            # It draws from numpy's generator, whose state is in Trainer's checkpoints, and which no hfkd data set uses.
            labels = batch["labels"] if self._mixes_labels else torch.zeros_like(batch["labels"])
            batch["pixel_values"], labels = self._mixup(batch["pixel_values"], labels)
            batch["labels"] = labels if self._mixes_labels else batch["labels"]
        self.distiller.attach_taps()  # unless they are; an earlier `train()` has removed them
        teacher = (self._filling or self.teacher)(batch) if self.distiller.needs_teacher else None
        model = model if self.compile_choice is None else self.compile_choice.network(model)
        with self.backend.autocast():
            terms = model(batch, teacher)
        loss = self.term_log.add(terms, len(inputs["labels"]))
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.term_log.steps:
            skipped = skipped_images("skipped_images", self.train_dataset, self.args)
            logs.update(self.term_log.drain(self.accelerator, self.distiller.metrics(), skipped))
        if "loss" in logs:
            self.divergence.look_at_losses(logs, self.state)
        super().log(logs, start_time)
        self.state.log_history[-1] = finite_or_none(self.state.log_history[-1])  # trainer_state.json holds it

    # ---- Data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, StreamingImageDataset):
            return without_signals(stream_loader(self.train_dataset, self.args, is_training=True))
        drawn = self._train_batch_size - unlabelled_images(self.train_dataset)  # the data set adds the others
        with changed_for_now(self.args, **self._columns(self.train_dataset)):
            with changed_for_now(self, _train_batch_size=drawn):
                return without_signals(super().get_train_dataloader())

    def _columns(self, dataset) -> dict[str, bool]:
        """Return the changed settings under which a data set's loader is built: hfkd's batches are whole already."""
        return {} if image_source(dataset) is None else {"remove_unused_columns": False}

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        # With persistent workers Trainer would keep the loader of any other data set as that of `eval_dataset`.
        kept = self.args.dataloader_persistent_workers and self._is_own(eval_dataset)
        with changed_for_now(self.args, dataloader_persistent_workers=kept):
            return self._evaluation_loader(
                self.eval_dataset[dataset] if isinstance(dataset, str) else dataset,
                lambda: super(DistillationTrainer, self).get_eval_dataloader(eval_dataset),
            )

    def _is_own(self, dataset) -> bool:
        """Return whether `evaluate(dataset)` is about `eval_dataset`, or one of several."""
        return dataset is None or isinstance(dataset, str) or dataset is self.eval_dataset

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return self._evaluation_loader(
            test_dataset, lambda: super(DistillationTrainer, self).get_test_dataloader(test_dataset)
        )

    def _evaluation_loader(self, dataset, trainers_own: Callable[[], DataLoader]) -> DataLoader:
        args = self.args
        if isinstance(dataset, StreamingImageDataset):
            dataset = evaluation_share(dataset, args, args.eval_batch_size, dataset is self.train_dataset)
            return without_signals(stream_loader(dataset, args, is_training=False))
        # Trainer would leave the last images out of an evaluation as well.
        with changed_for_now(args, dataloader_drop_last=False, **self._columns(dataset)):
            return without_signals(trainers_own())

    def num_examples(self, dataloader: DataLoader) -> int:
        dataset = dataloader.dataset
        return dataset.num_rows if isinstance(dataset, StreamingImageDataset) else super().num_examples(dataloader)

    def _prepare_input(self, data):
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # ---- Optimisation ----------------------------------------------------------------------------------------------

    def set_initial_training_values(self, args, dataloader):
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1]
        return values

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_parameter_names(model, self.args.decay_all_parameters)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class, optimizer_settings(optimizer_class, settings, args.distributed_state.distributed_type)

    def create_optimizer(self, model=None):
        created = self.optimizer is None
        # A user may call it with the student or without a model: what the losses own is trained as well.
        optimizer = super().create_optimizer(self.distiller)
        if created:
            # DeepSpeed drops empty groups, and schedules count them: checkpoints are to fit either way.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            if self.args.layer_decay is not None:
                scale_learning_rates(optimizer, layer_scales(self.distiller.student, self.args.layer_decay))
            self.backend.optimizer_created(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        self.optimizer = self.backend.optimizer_prepared(self.optimizer)  # Trainer has just had it prepared
        if self.lr_scheduler is None and self.args.lr_milestones:
            self.lr_scheduler = multi_step_schedule(
                optimizer or self.optimizer, self.args.lr_milestones, self.args.lr_gamma, self._steps_per_epoch
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_grad_norm(self, model, grad_norm=None):
        # Trainer measures the norm even where nothing is clipped, which costs a pass over all gradients.
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer's estimate (6 x parameters x inputs) is wrong for convolutions and costs a module walk

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as Trainer does; `results.json` gets a row for `eval_dataset` of the constructor, not for others.

        Raises:
            HfkdError: for a student without a classifier, if there are no losses either.
        """
        if not self.has_classifier and not self.distiller.losses:
            raise HfkdError("The student has no classifier, and so no top-1 that could be evaluated.")
        self.results.recording = self.eval_dataset is None or self._is_own(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _evaluation_metrics(self, keeps_logits: bool) -> EvaluationMetrics:
        with_losses = "loss" in self.args.include_for_metrics
        return EvaluationMetrics(self.compute_metrics, self.preprocess_logits_for_metrics, keeps_logits, with_losses)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        started = time.perf_counter()
        student = self.model
        if self.average is not None:
            self.model = self.average.module
        if self.args.world_size > 1:
            # Every rank has seen other images since the last forward: all evaluate with rank 0's BatchNorm statistics.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        measuring = self._measuring = Measuring(
            dataloader.dataset,
            self.model,
            self.args,
            self.state,
            is_prediction=description == "Prediction",
            with_labels=self._evaluation_metrics,
            users_metrics=self.compute_metrics is not None,
        )
        metrics = measuring.metrics
        users = {"compute_metrics": metrics, "preprocess_logits_for_metrics": metrics.preprocess}
        if self.compute_metrics is None:
            prediction_loss_only = None  # `evaluate` takes it for a sign that there is nothing to compute
        self.teacher_memory.open(dataloader.dataset)
        streamed = isinstance(dataloader.dataset, StreamingImageDataset)
        if streamed:  # nothing to leave out: its padding is marked, and accelerate does not know its length
            self.gather_function = self.accelerator.gather
        try:
            with (
                self._compiling(),
                changed_for_now(self, **users),
                own_forward(self.model),
                measuring.prepared(self.distiller, self.model),
            ):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self.model = student
        if measuring.keeps_logits and output.label_ids is not None:
            output = output._replace(predictions=metrics.logits(output.predictions))
        if streamed:  # Trainer takes the number of batches
            output = output._replace(num_samples=dataloader.dataset.num_rows)
        self.divergence.judge(output.metrics, metric_key_prefix, self.state)
        skipped = skipped_images(f"{metric_key_prefix}_skipped_images", dataloader.dataset, self.args)
        output.metrics.update(skipped)
        self.term_log.leave_out(time.perf_counter() - started)
        return output

    @torch.no_grad()
    def teacher_top1(self) -> float | None:
        """Return the teacher's top-1 in percent on `eval_dataset`; all processes must call it.

        Evaluations then find the teacher's choices remembered. None without a teacher that has the student's classes,
        or where nothing is remembered.
        """
        dataset = self.eval_dataset
        if self.teacher_memory.teacher is None or dataset is None or isinstance(dataset, dict):
            return None
        if measures_terms(dataset, self.model):
            return None
        self.teacher_memory.open(dataset)
        with torch.random.fork_rng([]):  # a loader draws from it, and the training must not depend on this
            batches = map(self._prepare_inputs, self.get_eval_dataloader())
            return self.teacher_memory.top1(batches, self.args.world_size, self._as_batch)

    def _as_batch(self, rows: Any) -> dict[str, Tensor]:
        """Return a batch on the device of what the data set gives for some images."""
        return self._prepare_inputs(self.data_collator(rows))

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return loss, outputs and labels of a batch; the outputs are those that the metrics describe."""
        measuring = self._measuring
        loss, outputs, labels = self._evaluated(model, inputs, prediction_loss_only)
        if measuring is not None and measuring.probe is not None and labels is not None:
            outputs = measuring.probe.paired(outputs, labels)
        return loss, outputs, labels

    def _evaluated(self, model, inputs, prediction_loss_only: bool) -> tuple[Tensor | None, Any, Tensor | None]:
        inputs, measuring = self._prepare_inputs(inputs), self._measuring
        labels = inputs.get("labels")
        if measuring is not None and measuring.terms is not None:
            figures = self._evaluated_terms(inputs, measuring.terms)
            return (measuring.terms.loss(figures), None, None) if prediction_loss_only else (None, figures, labels)
        labels = labels if measuring is None or measuring.reads_labels else None
        with self.backend.autocast():
            logits = at_least_float32(self.backend.predict(self.distiller, model)(inputs["pixel_values"]))
        self.divergence.watch(logits)
        if prediction_loss_only and labels is not None:
            return mean_cross_entropy(logits, labels), None, None
        if labels is None:
            return None, logits, None
        choice = self.teacher_memory.choice(inputs) if measuring is not None and measuring.asks_teacher else None
        kept = logits if measuring is not None and measuring.keeps_logits else None
        outputs = (*ranked_predictions(logits, labels), choice, kept)
        return None, tuple(output for output in outputs if output is not None), labels

    def _evaluated_terms(self, inputs: dict[str, Tensor], metrics: TermMetrics) -> Tensor:
        """Return the loss terms and the agreement with the teacher for each image of a batch, (B, T)."""
        batch = evaluated_batch(inputs, list(self.distiller.losses.values()), metrics.uncounted)
        asked = None if isinstance(self.teacher, CachedTeacher) else self.teacher  # which knows no evaluation images
        teacher = None if asked is None else asked(batch)
        with self.backend.autocast():
            terms, logits = self.distiller.evaluate(batch, teacher)
        self.divergence.watch(torch.stack([*terms.values(), logits.sum()]))
        agreeing = None
        if asked is not None and teacher is not None and asked.shares_classes:
            agreeing = logits.argmax(dim=1) == teacher.logits.argmax(dim=1)
        return metrics.rows(terms, agreeing, inputs["labels"])

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        finite = self.divergence.weights_are_finite(self.distiller.state_dict().values(), self.state)
        if not finite and self.divergence.stops:
            raise self.divergence.error()
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir, f"checkpoint-{self.state.global_step}")
        # Trainer would push and remove older checkpoints before this one is known to be whole.
        changes = {"save_total_limit": None, "push_to_hub": False}
        if self.stop_on_sigterm.stopping:
            changes["save_only_model"] = False
        with self.checkpoints.writing(folder), changed_for_now(self.args, **changes):
            super()._save_checkpoint(model, trial)
        if not self.pushes.running:  # what is being uploaded stays
            self.checkpoints.drop_old(run_dir, folder, self.state.best_model_checkpoint, self._save_total_limit)

    def save_model(self, output_dir=None, _internal_call=False):
        # Every process takes part in gathering; transformers 5.20 has only the first one come to `_save`, later all.
        self._whole_state = self.backend.whole_state(self.model)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._whole_state = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        state_dict = self._whole_state if state_dict is None else state_dict
        if state_dict is None:
            state_dict = exported_state_dict(self.model if self.average is None else self.average.module)
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # Trainer's pickle of the arguments holds the Hub token
            folder: Any = output_dir or self.args.output_dir  # a path once args is built
            os.remove(os.path.join(folder, TRAINING_ARGS_NAME))
            use_umask(Path(folder).glob(WEIGHTS_PATTERN))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            self.optimizer.state_dict()  # sharded, it is gathered: see `take_whole_states`
        super()._save_optimizer_and_scheduler(output_dir)
        unlogged = self.term_log.state(self.accelerator, self._tr_loss, self._globalstep_last_logged)
        self.checkpoints.save_training_state(output_dir, unlogged, self.distiller, self.average)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with self.checkpoints.loading(checkpoint):
            with self.checkpoints.settings_of_this_recipe(self.optimizer, self.lr_scheduler):
                super()._load_optimizer_and_scheduler(checkpoint)
            self.checkpoints.load_training_state(checkpoint, self.distiller, self.average)
        self.backend.weights_loaded(self.optimizer)

    def _determine_best_metric(self, metrics, trial):
        # save_strategy: best saves only where this says that it is the best, and the last step must be saved. What has
        # diverged never is. Where no best model is asked for, Trainer would miss the default metric among those of
        # several data sets.
        known = asks_for_best(self.args) or f"eval_{self.args.metric_for_best_model}" in metrics
        known = known and not between_probes(self.args.metric_for_best_model, metrics)
        is_best = known and self.divergence.logits_are_finite and super()._determine_best_metric(metrics, trial)
        self.state.best_metric = finite_or_none(self.state.best_metric)  # Trainer begins with an infinite one
        return is_best or self.stop_on_sigterm.stopping

    def _load_best_model(self) -> None:
        if self.stop_on_sigterm.stopped:  # the run goes on from its last step
            return
        check_best(self.state.best_model_checkpoint)  # type: ignore[arg-type]  # Trainer calls this where one is
        super()._load_best_model()
        if self.average is not None:
            self.average.module.load_state_dict(self.model.state_dict())
        self.divergence.logits_are_finite = True  # of the best, which an export then holds

    # ---- Export and Hub --------------------------------------------------------------------------------------------

    @property
    def export_folder(self) -> Path:
        """Folder of the exported model, `<output_dir>/student` by default."""
        return self.exports.folder

    def export(self, repo_id: str | None = None, **metadata: Any) -> Path:
        """Export the student: model, card, results, recipe and curves, whole or not at all.

        Args:
            repo_id: repository that the card names.
            **metadata: of the card; see `write_card`.

        Returns:
            `export_folder`.

        Raises:
            RunError: if it cannot be written, for example on a full disk, or if weights or logits are not finite; an
                earlier export is whole.
        """
        if not (self._exported_is_finite() and self.divergence.logits_are_finite):
            raise self.divergence.error()
        try:
            return self.exports.write(lambda folder: self.save_model(folder, _internal_call=True), repo_id, metadata)
        except (OSError, SafetensorError) as error:
            raise self.checkpoints.unwritten(self.export_folder, error) from error

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Export the student with its card; the run itself knows the other values that Trainer takes."""
        metadata: dict[str, Any] = {"language": language, "license": license, "tags": tags, "model_name": model_name}
        self.export(**metadata, finetuned_from=finetuned_from, dataset=dataset)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository unless it exists; Trainer calls this before anything is trained.

        Raises:
            HfkdError: see `open_repository`.
        """
        if self.is_world_process_zero():
            self.pushes.open(self.model, token, private)
            self.hub_model_id = self.pushes.repository

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **metadata: Any,
    ) -> Any:
        """Export the student and upload that folder: model, card, results, recipe, curves, and nothing else.

        Args:
            commit_message, blocking, token, revision, private: as Trainer's.
            **metadata: of the card; see `write_card`.

        Returns:
            The commit or, if not blocking, its Future; None in all processes but the first.

        Raises:
            PushError: if the Hub refuses or cannot be reached. The export is whole, and another call completes it.
        """
        self._tell_of_push()
        self.pushes.finish()
        is_first = self.is_world_process_zero()
        if is_first:
            self.pushes.find(self.model, token, private, revision)
            self.hub_model_id = self.pushes.repository
        self.export(self.pushes.repository, **metadata)
        return self.pushes.push_export(commit_message, blocking, token, revision) if is_first else None

    def _tell_of_push(self) -> None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
