"""Frozen teachers: one network, or an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

from ..errors import HfkdError
from ..losses.standardize import at_least_float32, standardize
from ..names import architecture_of
from .class_matching import check_class_indices, match_classes
from .costs import parameter_count
from .features import (
    EMBEDDING,
    InputSpec,
    Layer,
    Outputs,
    Taps,
    find_classifier,
    forward_views,
    is_classifier_of,
    remove_taps,
)
from .folding import Folded, fold, has_foldable_norms, to_precision
from .frozen import frozen_copy
from .headless import HeadlessNetwork, is_headless
from .sharding import shard_frozen

logger = logging.get_logger(__name__)

VIEWS = ("pixel_values", "pixel_values_strong")


class Teacher:
    """Frozen classifier or backbone, kept outside every module tree.

    It is no `nn.Module`, so it ends up in no checkpoint, no optimizer and no DDP bucket.

    Args:
        model: a transformers image classifier, a timm model or a module that returns logits (B, C). It is left as it
            was: the teacher is a copy over the same memory (see `frozen_copy`). Its weights must not change meanwhile.
        name: name in results; by default the architecture.
        input_spec: size and normalisation that it was trained with; the student's images are converted to them. None:
            it takes the student's images as they are.
        class_indices: for each of the student's classes, this teacher's class. None: they are matched by name.
        hub_id: repository on the Hub that its weights come from, if any.
        has_classifier: False for a model that returns features: tokens (B, N, C), a map (B, C, H, W) or a vector
            (B, D). None: a model of transformers or timm tells, and any other is a classifier.

    Attributes:
        folded: the network with folded batch norms that is run in place of `model`, or None; see `prepare`.
        shares_classes: True if its logits are those of the student's classes. False without a classifier and, once
            `align_classes` has found it, for a classifier of other classes.

    Raises:
        HfkdError: if class_indices are given for a network without a classifier, or it does not take images.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str | None = None,
        input_spec: InputSpec | None = None,
        class_indices: Sequence[int] | None = None,
        hub_id: str | None = None,
        has_classifier: bool | None = None,
    ):
        self.name = name or architecture_of(model)
        self.hub_id = hub_id
        remove_taps(model)  # of an earlier trainer: the copy would take over its hooks
        frozen = frozen_copy(model)
        headless = is_headless(model) if has_classifier is None else not has_classifier
        self.model = HeadlessNetwork(frozen).eval() if headless else frozen
        if headless and class_indices is not None:
            raise HfkdError(f"teacher_class_indices is for a teacher with classes, and {self.name} has no classifier.")
        self.shares_classes = not headless
        self.input_spec = input_spec
        self.class_indices = class_indices
        self._autocast_dtype: torch.dtype | None = None
        self.folded: Folded | None = None
        self._taps: Taps | None = None
        self._rescale: tuple[Tensor, Tensor] | None = None
        self._columns: Tensor | None = None
        # Copied now, since `prepare` rounds the weights, and the losses that reuse the classifier need them in float32.
        self._original_classifier = _copy_of_classifier(self.model)
        self._classifier: nn.Linear | None = None

    @property
    def members(self) -> list[Teacher]:
        """List that holds this teacher alone; an ensemble has several members."""
        return [self]

    @property
    def has_classifier(self) -> bool:
        """False for a network without a classifier, whose logits are (B, 0)."""
        return not isinstance(self.model, HeadlessNetwork)

    @property
    def network(self) -> nn.Module:
        """Frozen network, without the `HeadlessNetwork` around a backbone."""
        return self.model.backbone if isinstance(self.model, HeadlessNetwork) else self.model

    @property
    def dispatched(self) -> bool:
        """True if accelerate's hooks place its parts on several devices, as with `device_map`."""
        return hasattr(self.network, "_hf_hook")

    @property
    def is_folded(self) -> bool:
        """True if a network with folded batch norms is run in place of `model`; see `prepare`."""
        return self.folded is not None

    @property
    def is_sharded(self) -> bool:
        """True if each process holds a shard of it; then all processes must call it equally often."""
        return isinstance(self.model, FSDPModule)

    def prepare(
        self,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        channels_last: bool,
        student_input: InputSpec | None = None,
        layers: Sequence[Layer] = (),
        shard: bool = False,
        member_layers: Sequence[Layer] = (),
    ) -> None:
        """Move the teacher to a device and into the precision and layout of the run.

        Convolution and linear weights are converted to the autocast type once. Autocast itself would convert them again
        in every step, since its weight cache lives for one forward pass. Norms keep float32 weights, as under autocast,
        so the logits are the same.

        Under autocast, if nothing but logits and embedding is read, the batch norms are folded into the convolutions
        where that is as exact (see `folding.py`): then this copy is run, and `model` stays as it is. The decision
        depends on teacher, precision, layout and image size alone, so that live runs and caches agree to the bit.

        Args:
            student_input: normalisation of the images. None: they are normalised for this teacher.
            layers: layers whose outputs are recorded in `features`.
            shard: shard it among the processes (FSDP); the value must be the same in all of them.
            member_layers: further layers, which losses read of each of several teachers.

        Raises:
            HfkdError: if the weights were converted to another type before, if a layer does not exist, or if a teacher
                with a device_map is to be sharded.
        """
        layers = [*layers, *member_layers]
        weights = [module for module in self.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        half = {module.weight.dtype for module in weights} & {torch.float16, torch.bfloat16}
        if half - {autocast_dtype}:
            raise HfkdError(
                f"This teacher's weights are in {half.pop()}, from an earlier trainer or its own checkpoint, and the "
                f"run's precision is {autocast_dtype or torch.float32}: load the teacher again, in float32."
            )
        if self.dispatched and shard:
            raise HfkdError(
                "The teacher has a device_map, which already spreads it over devices: leave out either device_map or "
                "shard_teacher."
            )
        self._autocast_dtype = autocast_dtype
        spec = self.input_spec or student_input
        self.folded = None
        if spec is not None and not (shard or self.is_sharded or self.dispatched or set(layers) - {EMBEDDING}):
            self.folded = self._fold(device, channels_last, spec.image_size)
        # An earlier trainer or the caller may have sharded it: then it stays as it is.
        if not (self.is_folded or self.is_sharded):
            to_precision(self.model, autocast_dtype)
            if shard:
                shard_frozen(self.model)
            elif not self.dispatched:
                self.model.to(device)
                if channels_last:
                    self.model.to(memory_format=torch.channels_last)
        self._classifier = self._original_classifier if EMBEDDING in layers else None
        if self._classifier is not None:
            self._classifier.to(device)
        self._taps = Taps(self.running, layers) if layers else None
        self._rescale = self._renormalisation(student_input, device)

    @property
    def running(self) -> nn.Module:
        """The network that is run: `model`, or the one with folded batch norms."""
        return self.model if self.folded is None else self.folded.network

    def _fold(self, device: torch.device, channels_last: bool, image_size: int) -> Folded | None:
        """Return the network with folded batch norms; None where there are none, or the plain one is more exact."""
        if self._autocast_dtype is None or not (self.has_classifier and has_foldable_norms(self.model)):
            return None
        try:
            folded = fold(self.model, device, self._autocast_dtype, channels_last, image_size)
        except Exception as error:  # the code of a model may read what is no longer there
            logger.warning(f"The batch norms of the teacher {self.name} are not folded: {error!r}")
            return None
        if folded.norms and not folded.is_exact:
            logger.warning(f"The teacher {self.name} is run as it is, since it is less exact with {folded}.")
        return folded if folded.is_exact else None

    def align_classes(self, student_names: Sequence[str], batch: dict[str, Tensor], required: bool = True) -> None:
        """Find this teacher's class for each of the student's; from then on the logits are for these classes.

        Args:
            student_names: names of the student's classes; none for a student without a classifier.
            required: losses compare the logits. Otherwise a teacher with other classes is taken as it is.

        Raises:
            HfkdError: if the names do not determine the match and it is required, if an entry of `class_indices` is no
                class of this teacher, or if its logits or features are NaN.
        """
        self._columns = None
        outputs = self(batch)
        for kind, value in (("logits", outputs.logits), *(("features", value) for value in outputs.features.values())):
            if value.isnan().any():
                raise HfkdError(
                    f"The {kind} of the teacher {self.name} for the first images are NaN: its weights may come from a "
                    "run that diverged. Give other weights, or check the images."
                )
        self.shares_classes = self.has_classifier and len(student_names) > 0
        if not self.shares_classes:
            self._classifier = None
            return
        classes = outputs.logits.shape[1]
        # The structure of a network does not tell whether its logits are one linear layer over the embedding, so it is
        # checked on a batch. Losses that reuse the classifier then find None.
        if self._classifier is not None and not is_classifier_of(outputs, self._classifier):
            self._classifier = None
        indices = self.class_indices
        if indices is None:
            try:
                indices = match_classes(student_names, self.model, classes)
            except HfkdError:
                if required:
                    raise
                self.shares_classes = False
        else:
            check_class_indices(indices, len(student_names), classes)
        if indices is not None:
            self._columns = torch.tensor(indices, device=batch["pixel_values"].device)
            if self._classifier is not None:
                self._classifier = _select_classes(self._classifier, self._columns)

    def _renormalisation(self, given: InputSpec | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return scale and shift (3, 1, 1) from the student's normalisation to this teacher's; None if they agree."""
        own = self.input_spec
        if given is None or own is None or (given.mean, given.std) == (own.mean, own.std):
            return None
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
            for values in (given.mean, given.std, own.mean, own.std)
        )
        return (std / own_std).float().to(device), ((mean - own_mean) / own_std).float().to(device)

    def convert(self, pixel_values: Tensor) -> Tensor:
        """Convert the student's images (B, 3, H, W) to this teacher's size (bilinearly) and normalisation.

        There is no antialiasing, as published: a CIFAR image enlarged to 224 and sampled at 32 is the CIFAR image
        again, and antialiasing would blur it.
        """
        if self.input_spec is not None and pixel_values.shape[-2:] != (self.input_spec.image_size,) * 2:
            size = (self.input_spec.image_size,) * 2
            pixel_values = F.interpolate(pixel_values, size, mode="bilinear", align_corners=False)
        if self._rescale is not None:
            scale, shift = self._rescale
            pixel_values = pixel_values * scale + shift
        return pixel_values

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Outputs:
        """Return the outputs for every view in `batch` (`pixel_values`, perhaps `pixel_values_strong`), in float32."""
        images = {view: self.convert(batch[view]) for view in VIEWS if view in batch}
        device = batch["pixel_values"].device
        with torch.autocast(device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            outputs = forward_views(self.running, images, self._taps)
        # With a `device_map`, features and logits may be on other devices than the images.
        outputs.features = {layer: at_least_float32(value).to(device) for layer, value in outputs.features.items()}
        outputs.classifier = self._classifier
        for view in outputs.views():
            logits = at_least_float32(view.logits).to(device)
            view.logits = logits if self._columns is None else logits.index_select(1, self._columns)
        return outputs

    def compile(self, **options) -> None:
        """Compile the network with torch.compile."""
        self.running.compile(**options)

    def uncompile(self) -> None:
        """Run the network as before `compile`."""
        self.running._compiled_call_impl = None

    def parameter_count(self) -> int:
        """Return the number of parameters."""
        return parameter_count(self.model)


def _copy_of_classifier(model: nn.Module) -> nn.Linear | None:
    """Return a copy of the classifier, in float32 or wider, if it is one linear layer; else None."""
    try:
        classifier = find_classifier(model)
    except ValueError:  # no classifier is found; this is an error only for losses that read it
        return None
    if not isinstance(classifier, nn.Linear):
        return None
    with align_module_device(classifier):  # accelerate may have offloaded the weights of a dispatched teacher
        all_classes = torch.arange(classifier.out_features, device=classifier.weight.device)
        return _select_classes(classifier, all_classes).to(at_least_float32(classifier.weight).dtype)


def _select_classes(classifier: nn.Linear, columns: Tensor) -> nn.Linear:
    """Return a copy of the classifier for some of its classes, in the given order."""
    selected = nn.utils.skip_init(nn.Linear, classifier.in_features, len(columns), bias=classifier.bias is not None)
    selected.weight = nn.Parameter(classifier.weight[columns], requires_grad=False)
    if classifier.bias is not None:
        selected.bias = nn.Parameter(classifier.bias[columns], requires_grad=False)
    return selected


class TeacherEnsemble:
    """Several teachers as one: the mean of their logits, each at its own resolution, normalisation and classes.

    Args:
        members: two teachers or more.
        standardized: average Z-scored logits, for runs with `logit_standardization`. Raw logits would let the teacher
            with the widest logits outvote the others.

    Raises:
        HfkdError: if a member has no classifier.
    """

    has_classifier = shares_classes = True

    def __init__(self, members: Sequence[Teacher], standardized: bool):
        check_ensemble_members([member.name for member in members if not member.has_classifier])
        self.members = list(members)
        self.standardized = standardized
        self.name = " + ".join(member.name for member in self.members)

    def prepare(
        self,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        channels_last: bool,
        student_input: InputSpec | None = None,
        layers: Sequence[Layer] = (),
        shard: bool = False,
        member_layers: Sequence[Layer] = (),
    ) -> None:
        """Call `Teacher.prepare` of each member.

        Raises:
            HfkdError: as `Teacher.prepare`; also for `layers`, since an ensemble has no features of its own.
        """
        if layers:
            raise HfkdError(
                f"Losses read the teacher's layers {list(layers)}, and an ensemble ({self.name}) has no layers in "
                "common: give one teacher, or only losses that read logits."
            )
        for member in self.members:
            member.prepare(device, autocast_dtype, channels_last, student_input, member_layers, shard)

    def align_classes(self, student_names: Sequence[str], batch: dict[str, Tensor], required: bool = True) -> None:
        """Call `Teacher.align_classes` of each member; the mean of their logits requires their classes to match."""
        for member in self.members:
            member.align_classes(student_names, batch)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Outputs:
        """Return the mean logits for every view in `batch`, in float32."""
        outputs = [member(batch) for member in self.members]
        views = [self._mean(view) for view in zip(*(output.views() for output in outputs), strict=True)]
        views[0].strong = views[1] if len(views) == 2 else None
        return views[0]

    def _mean(self, outputs: Sequence[Outputs]) -> Outputs:
        logits = [standardize(output.logits) if self.standardized else output.logits for output in outputs]
        mean = torch.stack(logits).mean(dim=0)
        return Outputs(mean, mean, members=outputs)

    def compile(self, **options) -> None:
        """Compile each member with torch.compile."""
        for member in self.members:
            member.compile(**options)

    def parameter_count(self) -> int:
        """Return the number of parameters of all members together."""
        return sum(member.parameter_count() for member in self.members)


def check_ensemble_members(headless: Sequence[str]) -> None:
    """Check that no member of an ensemble lacks a classifier.

    Args:
        headless: names of the members without one.

    Raises:
        HfkdError: if there are some.
    """
    if headless:
        raise HfkdError(
            f"Several teachers are the mean of their logits, and {headless[0]} has no classifier: give it alone, with "
            "losses that read features, or leave it out."
        )


def check_placement(teacher: Teacher | TeacherEnsemble, processes: int, compiled: bool) -> None:
    """Check that a teacher with a device_map can be used in this run.

    Raises:
        HfkdError: if there are several processes, or the networks are compiled.
    """
    if not any(member.dispatched for member in teacher.members):
        return
    if processes > 1:
        raise HfkdError(
            f"{teacher.name} is spread over devices by a device_map, and this run has {processes} processes: start one "
            "process, or shard the teacher with FSDP (recipes/accelerate/fsdp.yaml, shard_teacher: true)."
        )
    if compiled:
        raise HfkdError("torch_compile is not supported with a device_map: leave one of them out.")
