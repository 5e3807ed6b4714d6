"""`DistillationTrainer`: transformers' Trainer with a teacher and distillation losses."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, ProgressCallback
from transformers.utils import logging

from . import zero
from .arguments import DistillationConfig
from .callbacks import ProgressLines, UpdateAverage
from .checks import check_ensemble, check_last_batch, check_placement, check_roles
from .classes import class_names_of
from .data import ImageSource, StreamingImageDataset, collate_batch
from .distiller import Distiller
from .features import logits_of, remove_taps, settle_layers
from .fsdp import check_asked_for, prepare_to_shard, take_whole_states, use_fsdp
from .image_trainer import image_source, training_labels
from .loading import as_teacher, wrap_timm
from .losses import DistillationLoss, build_losses
from .losses.standardize import at_least_float32
from .metrics import compute_metrics
from .preemption import StopOnSigterm
from .recomputation import use_gradient_checkpointing
from .results import ResultsWriter, environment
from .resuming import UNLOGGED_NAME
from .reuse import with_teacher_classifier
from .saving import SavingTrainer
from .sharing import hub_id, public_name
from .teacher import Teacher, TeacherEnsemble
from .teacher_cache import CachedTeacher

logger = logging.get_logger(__name__)


class DistillationTrainer(SavingTrainer):
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
        model: nn.Module,
        teacher: Teacher | TeacherEnsemble | CachedTeacher | nn.Module | Sequence[Teacher | nn.Module] | None = None,
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
        check_roles(model, teacher, losses, args)
        remove_taps(model)  # an earlier trainer's
        if hasattr(model, "pretrained_cfg"):  # a bare timm model
            model = _wrapped(model, image_source(train_dataset))
        teacher = as_teacher(teacher, args.logit_standardization)
        if isinstance(teacher, CachedTeacher):
            teacher.fit(image_source(train_dataset), losses, args)
        dataset = eval_dataset if train_dataset is None else train_dataset
        model = with_teacher_classifier(model, teacher, losses, image_source(dataset))
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if isinstance(train_dataset, StreamingImageDataset):  # Trainer asks for its length at once
            train_dataset.shard(args.process_index, args.world_size, args.train_batch_size, args.dataloader_drop_last)
        kwargs.setdefault("data_collator", collate_batch)
        kwargs.setdefault("compute_metrics", compute_metrics)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressLines)
        if isinstance(self.model, PreTrainedModel):
            # Else transformers saves some of its own models under former parameter names, which `from_pretrained`
            # converts and Trainer, on resuming or loading the best, does not: it leaves the weights as they are.
            self.model._weight_conversions = []

        # Before the losses tap the student: a copy would carry their hooks along.
        self.average = None if args.ema_decay is None else ModelEmaV3(self.model, args.ema_decay)
        if self.average is not None:
            self.add_callback(UpdateAverage(self.average, self.model))
        use_gradient_checkpointing(self.model, args)
        self.teacher = teacher
        if self.teacher is not None:
            self._prepare_teacher(losses)
        self.distiller = Distiller(self.model, losses, args.ce_weight)
        self.results = ResultsWriter()
        self.results.facts = self._facts(losses)
        self.add_callback(self.results)
        self.stop_on_sigterm = StopOnSigterm()
        self.add_callback(self.stop_on_sigterm)
        self._term_names: list[str] = []
        self._start_counting()
        self._keep_logits = False
        self._mixup: Mixup | None = None
        self._teacher_memories: WeakKeyDictionary[ImageSource, Tensor | None] = WeakKeyDictionary()
        self._teacher_memory: Tensor | None = None
        cache = self.teacher.files if isinstance(self.teacher, CachedTeacher) else None
        self._place_data(max([loss.views for loss in losses.values()], default=1), cache)
        self._dry_run()
        if isinstance(train_dataset, Sized) and not isinstance(train_dataset, IterableDataset):
            check_last_batch(losses, len(train_dataset), args)
        self.distiller.to(args.device)
        if args.torch_compile:
            self._prepare_to_compile()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.shards = self.accelerator.distributed_type == DistributedType.FSDP  # not where there is but a plugin
        check_asked_for(self.args, self.shards)
        if self.shards:
            use_fsdp(self.accelerator, self.args)
            # In its branches for FSDP Trainer takes `self.model` for what is sharded, which is the distiller, and
            # writes checkpoints that other runs cannot read. The others do, since accelerate shards in `prepare`.
            self.is_fsdp_enabled = False
        elif self.args.shard_teacher:
            raise ValueError(
                "shard_teacher goes with FSDP: start with --config_file recipes/accelerate/fsdp.yaml, or leave it out."
            )
        self.zero = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        zero.check_asked_for(self.args, self.zero)
        if self.zero:
            zero.use_zero(self.accelerator, self.args)
            self.is_deepspeed_enabled = False  # likewise: accelerate hands over to DeepSpeed in `prepare`

    # ---- Before training ---------------------------------------------------------------------------------------

    def _facts(self, losses: nn.ModuleDict) -> dict[str, Any]:
        """What `results.json` says of the run beside what was measured; `run.train` adds what only a recipe knows."""
        args, teacher = self.args, self.teacher
        name_or_path = getattr(self.model, "name_or_path", "")  # of a transformers model
        origins = [hub_id(name_or_path), *(member.hub_id for member in (teacher.members if teacher else []))]
        cached = {"teacher_cache": teacher.settings()} if isinstance(teacher, CachedTeacher) else {}
        return {
            "role": self.export_name,
            "recipe": None,
            "student": public_name(name_or_path, self.model),
            "teacher": teacher.name if teacher else None,
            "base_models": [origin for origin in dict.fromkeys(origins) if origin],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "teacher_parameters": teacher.parameter_count() if teacher else None,
            **cached,
            "losses": {name: loss.settings() for name, loss in losses.items()},
            "logit_standardization": args.logit_standardization,
            "ce_weight": args.ce_weight,
            "dataset": None,
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
            check_placement(self.teacher, args)
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
            raise ValueError(
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
                raise ValueError(
                    f"The loss '{name}' needs two views of every image: the batches must hold 'pixel_values_strong' "
                    f"beside 'pixel_values', but hold {sorted(batch)}."
                )
            try:
                if loss.needs_index and self.train_dataset is not None:
                    loss.setup_rows(training_labels(self.train_dataset))
                loss.setup(student, teacher)
            except ValueError as error:
                raise ValueError(f"losses.{name}: {error}") from error

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # Optimizer, DDP and compile must cover student and losses together: two modules prepared side by side train
        # the losses wrongly. So the distiller stands in for the student while Trainer prepares "the model".
        self.distiller.student = student = self.model
        first = self.shards and not isinstance(self.distiller, FSDPModule)
        if first:
            prepare_to_shard(self.distiller)
        if self.zero:
            zero.prepare_for_zero(self.distiller, self.accelerator)
        self.model = self.model_wrapped = self.distiller
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.model = student
        if first:
            register_fsdp_forward_method(self.distiller, "logits")
        self.callback_handler.model = student
        self._start_counting()
        return prepared

    def create_optimizer(self, model=None):
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            # DeepSpeed drops empty groups, and schedules count them: checkpoints are to fit either way.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        if created and self.shards:
            take_whole_states(optimizer)
        if created and self.zero:
            self._parameter_groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.zero:  # called first where all else of the optimizer is settled
            self.optimizer = zero.ZeroOptimizer(self.optimizer.optimizer, self._parameter_groups)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.zero:
            self.optimizer.take_weights()

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

    def _autocast(self) -> contextlib.AbstractContextManager:
        """In `prepare` accelerate leaves it out with FSDP and DeepSpeed, and with the latter it has none at all."""
        if self.zero:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

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

    # ---- Evaluation ----------------------------------------------------------------------------------------------

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
        self._keep_logits = description == "Prediction"
        self._teacher_memory = self._memory_of(dataloader.dataset)
        streamed = isinstance(dataloader.dataset, StreamingImageDataset)
        if streamed:  # nothing to leave out: its padding is marked, and accelerate does not know its length
            self.gather_function = self.accelerator.gather
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.model = student
        if streamed:  # Trainer takes the number of batches
            output = output._replace(num_samples=dataloader.dataset.num_rows)
        output.metrics.update(self._skipped(f"{metric_key_prefix}_skipped_images", dataloader.dataset))
        self._clock += time.perf_counter() - started  # images_per_second speaks of training alone
        return output

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Cross-entropy, predictions, labels. `predict()` gets logits; `evaluate()` only the best classes of student
        and teacher, so that ImageNet's logits need not be gathered."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with self._autocast():
            forward = self.distiller.logits if self.shards else functools.partial(logits_of, model)
            logits = at_least_float32(forward(inputs["pixel_values"]))
        if prediction_loss_only and labels is not None:
            counting = (labels != ImageSource.IGNORED).sum().clamp(min=1)
            return F.cross_entropy(logits, labels, reduction="sum") / counting, None, None
        if self._keep_logits or labels is None:
            return None, logits, labels
        ranked = logits.topk(min(5, logits.shape[1])).indices
        # One loss an image: Trainer's mean over batches would count twice the images that pad a rank's last batch.
        losses = F.cross_entropy(logits, labels, reduction="none")
        choice = None if self.teacher is None else self._teacher_choice(inputs)
        return None, (ranked, losses) if choice is None else (ranked, losses, choice), labels

    def _memory_of(self, dataset) -> Tensor | None:
        """What the teacher chose in earlier evaluations of an unaugmented data set of ours, (N,), -1 where not known.

        The teacher never changes, and is often several times the student: asking it once saves most of the time of
        every later evaluation.
        """
        source = image_source(dataset)
        if source is None or source.augmented:
            return None
        if source not in self._teacher_memories:
            cached = isinstance(self.teacher, CachedTeacher)
            known = self.teacher.choices(source) if cached else torch.full((source.num_rows,), -1)
            self._teacher_memories[source] = None if known is None else known.to(self.args.device)
        return self._teacher_memories[source]

    def _teacher_choice(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """The teacher's most probable class for each image, (B,); None where a cache does not tell."""
        index = inputs.get("index")
        memory = None if index is None else self._teacher_memory
        if isinstance(self.teacher, CachedTeacher):
            return None if memory is None else memory[index]
        if memory is not None and self._everywhere((memory[index] >= 0).all()):
            return memory[index]
        choice = self.teacher({"pixel_values": inputs["pixel_values"]}).logits.argmax(dim=1)
        if memory is not None:
            memory[index] = choice
        return choice

    def _everywhere(self, known: Tensor) -> bool:
        """Is it so in this process; where they must all ask the teacher, or none, in all of them?"""
        if any(member.shared_out for member in self.teacher.members):
            known = known.int()
            torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MIN)
        return bool(known)


def _wrapped(model: nn.Module, source: ImageSource | None) -> PreTrainedModel:
    """A bare timm model in transformers' wrapper, its classes named by the data set as far as that has names."""
    names = [] if source is None else source.class_names
    return wrap_timm(model, [*names, *map(str, range(len(names), model.num_classes))][: model.num_classes])
