"""The frozen network, or networks, that teach."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import HfkdError, RunError
from ..losses.standardize import at_least_float32, standardize
from ..names import architecture_of
from .class_matching import check_class_indices, match_classes
from .costs import parameter_count
from .features import EMBEDDING, InputSpec, Layer, Outputs, Taps, find_classifier, forward_views, remove_taps
from .sharding import share_out

VIEWS = ("pixel_values", "pixel_values_strong")


def _refuse_train_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `module.train`."""
    if mode:
        raise RunError("A teacher stays in eval mode: its BatchNorm statistics and its dropout must not train.")
    return module


class Teacher:
    """A classifier that is frozen in place and kept outside every module tree.

    It is no `nn.Module`, so it ends up in no checkpoint, no optimizer and no DDP bucket. The model given becomes part
    of it: its parameters stop requiring gradients and `model.train()` raises from then on.

    Args:
        model: a transformers image classifier, a timm model or a module that returns logits (B, C).
        name: what to call it in results; by default its architecture.
        input_spec: size and normalisation that it was trained with: the student's images are converted to them.
            None: it takes what the student takes.
        class_indices: for each of the student's classes, this teacher's class. None: they are matched by name.
        hub_id: the repository on the Hub that its weights come from, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str | None = None,
        input_spec: InputSpec | None = None,
        class_indices: Sequence[int] | None = None,
        hub_id: str | None = None,
    ):
        self.name = name or architecture_of(model)
        self.hub_id = hub_id
        self.model = model.requires_grad_(False).eval()
        for module in self.model.modules():
            module.train = functools.partial(_refuse_train_mode, module)
        self.input_spec = input_spec
        self.class_indices = class_indices
        self._autocast_dtype: torch.dtype | None = None
        self._taps: Taps | None = None
        self._rescale: tuple[Tensor, Tensor] | None = None
        self._columns: Tensor | None = None
        # A copy, before `prepare` rounds its weights.
        self._original_classifier = _copy_of_classifier(self.model)
        self._classifier: nn.Linear | None = None

    @property
    def members(self) -> list[Teacher]:
        """Itself: an ensemble has several."""
        return [self]

    @property
    def dispatched(self) -> bool:
        """Do accelerate's hooks say where each part of it is, as with `device_map`?"""
        return hasattr(self.model, "_hf_hook")

    @property
    def shared_out(self) -> bool:
        """Does each process hold a part of it? Then all must call it equally often."""
        return isinstance(self.model, FSDPModule)

    def prepare(
        self,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        channels_last: bool,
        student_input: InputSpec | None = None,
        layers: Sequence[Layer] = (),
        share: bool = False,
    ) -> None:
        """Moves the teacher to a device and into the precision and layout of the run.

        Convolution and linear weights are converted to the autocast type once, since autocast would otherwise convert
        them again in every step (its weight cache lives for one forward). Norms keep float32 weights, as under
        autocast, so the logits are the same.

        Args:
            student_input: what the images are normalised for; None: for this teacher.
            layers: whose outputs `features` holds.
            share: shares it out among the processes (FSDP); it must be the same in each.

        Raises:
            ValueError: if the weights were converted to another type before, or a layer does not exist, or the teacher
                is spread over devices and to be shared out as well.
        """
        weights = [module for module in self.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        half = {module.weight.dtype for module in weights} & {torch.float16, torch.bfloat16}
        if half - {autocast_dtype}:
            raise HfkdError(
                f"This teacher's weights are in {half.pop()}, from an earlier trainer or its own checkpoint, and the "
                f"run's precision is {autocast_dtype or torch.float32}: load the teacher again, in float32."
            )
        if self.dispatched and share:
            raise HfkdError("A teacher with a device_map is spread already: leave it out, or shard_teacher.")
        self._autocast_dtype = autocast_dtype
        if not self.shared_out:  # else it stays as an earlier trainer, or the caller, has shared it out
            for module in weights if autocast_dtype is not None else ():
                module.to(autocast_dtype)
            if share:
                share_out(self.model)
            elif not self.dispatched:
                self.model.to(device)
                if channels_last:
                    self.model.to(memory_format=torch.channels_last)
        self._classifier = self._original_classifier if EMBEDDING in layers else None
        if self._classifier is not None:
            self._classifier.to(device)
        self._taps = Taps(self.model, layers) if layers else None
        self._rescale = self._renormalisation(student_input, device)

    def align_classes(self, student_names: Sequence[str], batch: dict[str, Tensor]) -> None:
        """Finds this teacher's class for each of the student's; from then on the logits are those of these classes.

        Raises:
            ValueError: if neither `class_indices` nor the names tell, or an index is none of this teacher's classes.
        """
        self._columns = None
        outputs = self(batch)
        classes = outputs.logits.shape[1]
        if self._classifier is not None and not _is_linear(outputs):
            self._classifier = None
        indices = self.class_indices
        if indices is None:
            indices = match_classes(student_names, self.model, classes)
        else:
            check_class_indices(indices, len(student_names), classes)
        if indices is not None:
            self._columns = torch.tensor(indices, device=batch["pixel_values"].device)
            if self._classifier is not None:
                self._classifier = _select_classes(self._classifier, self._columns)

    def _renormalisation(self, given: InputSpec | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Scale and shift (3, 1, 1) from the student's normalisation to this teacher's; None where they agree."""
        own = self.input_spec
        if given is None or own is None or (given.mean, given.std) == (own.mean, own.std):
            return None
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
            for values in (given.mean, given.std, own.mean, own.std)
        )
        return (std / own_std).float().to(device), ((mean - own_mean) / own_std).float().to(device)

    def convert(self, pixel_values: Tensor) -> Tensor:
        """The student's images (B, 3, H, W) at this teacher's size, reduced or enlarged bilinearly, and normalisation.

        Without antialiasing, as published: a CIFAR image enlarged to 224 and sampled at 32 is the CIFAR image again,
        and antialiasing would blur it.
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
        """Outputs for every view in `batch` (`pixel_values` and maybe `pixel_values_strong`), in float32."""
        images = {view: self.convert(batch[view]) for view in VIEWS if view in batch}
        device = batch["pixel_values"].device
        with torch.autocast(device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            outputs = forward_views(self.model, images, self._taps)
        # Both may be elsewhere with a `device_map`.
        outputs.features = {layer: at_least_float32(value).to(device) for layer, value in outputs.features.items()}
        outputs.classifier = self._classifier
        for view in outputs.views():
            logits = at_least_float32(view.logits).to(device)
            view.logits = logits if self._columns is None else logits.index_select(1, self._columns)
        return outputs

    def compile(self, **options) -> None:
        self.model.compile(**options)

    def parameter_count(self) -> int:
        return parameter_count(self.model)


def _is_linear(outputs: Outputs) -> bool:
    """Are the logits those of the classifier over the embedding? Not where two heads are averaged, for one."""
    logits = outputs.classifier(outputs.embedding.to(outputs.classifier.weight.dtype))
    return bool((logits - outputs.logits).abs().max() <= 0.05 * outputs.logits.abs().max())  # bf16 is 0.01 off


def _copy_of_classifier(model: nn.Module) -> nn.Linear | None:
    """The classifier in float32 or wider, if it is a linear layer."""
    remove_taps(model)  # else the copy has those of an earlier trainer
    try:
        classifier = find_classifier(model)
    except ValueError:  # only losses that need one ask for it
        return None
    if not isinstance(classifier, nn.Linear):
        return None
    with align_module_device(classifier):  # a dispatched one's weights may be elsewhere
        all_classes = torch.arange(classifier.out_features, device=classifier.weight.device)
        return _select_classes(classifier, all_classes).to(at_least_float32(classifier.weight).dtype)


def _select_classes(classifier: nn.Linear, columns: Tensor) -> nn.Linear:
    """A copy of the classifier for some of the classes, in another order."""
    selected = nn.utils.skip_init(nn.Linear, classifier.in_features, len(columns), bias=classifier.bias is not None)
    selected.weight = nn.Parameter(classifier.weight[columns], requires_grad=False)
    if classifier.bias is not None:
        selected.bias = nn.Parameter(classifier.bias[columns], requires_grad=False)
    return selected


class TeacherEnsemble:
    """Several teachers as one: their logits' mean, each at its own resolution, normalisation and classes.

    Args:
        members: two teachers or more.
        standardized: average Z-scored logits, for runs with `logit_standardization`: else the teacher with the widest
            logits outvotes the others.
    """

    def __init__(self, members: Sequence[Teacher], standardized: bool):
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
        share: bool = False,
    ) -> None:
        """`Teacher.prepare` for each.

        Raises:
            ValueError: as there, and for layers: an ensemble has no feature of its own.
        """
        if layers:
            raise HfkdError(
                f"Losses read the teacher's layers {list(layers)}, and an ensemble ({self.name}) has none in common: "
                "give one teacher, or only losses that read logits."
            )
        for member in self.members:
            member.prepare(device, autocast_dtype, channels_last, student_input, share=share)

    def align_classes(self, student_names: Sequence[str], batch: dict[str, Tensor]) -> None:
        """`Teacher.align_classes` for each."""
        for member in self.members:
            member.align_classes(student_names, batch)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Outputs:
        """Mean logits for every view in `batch`, in float32."""
        outputs = [member(batch) for member in self.members]
        views = [self._mean(view) for view in zip(*(output.views() for output in outputs), strict=True)]
        views[0].strong = views[1] if len(views) == 2 else None
        return views[0]

    def _mean(self, outputs: Sequence[Outputs]) -> Outputs:
        logits = [standardize(output.logits) if self.standardized else output.logits for output in outputs]
        mean = torch.stack(logits).mean(dim=0)
        return Outputs(mean, mean)

    def compile(self, **options) -> None:
        for member in self.members:
            member.compile(**options)

    def parameter_count(self) -> int:
        return sum(member.parameter_count() for member in self.members)


def check_placement(teacher: Teacher | TeacherEnsemble, processes: int, compiled: bool) -> None:
    """Raises ValueError where a teacher that accelerate's hooks spread over devices cannot be used."""
    if not any(member.dispatched for member in teacher.members):
        return
    if processes > 1:
        raise HfkdError(
            f"{teacher.name} is spread over devices by a device_map, and {processes} processes would each do so: "
            "start one process, or share out the teacher by FSDP (recipes/accelerate/fsdp.yaml, shard_teacher: true)."
        )
    if compiled:
        raise HfkdError("torch_compile was not tried with a device_map: leave one of them out.")
