"""Program that uses every public name as a user would. mypy checks it, with strict flags; nothing runs it.

`test_public_api.py` checks that no public name is missing here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from typing_extensions import assert_type

from hfkd import (
    CachedTeacher,
    DataArguments,
    DistillationConfig,
    DistillationTrainer,
    ModelArguments,
    Teacher,
    inherit_blocks,
    input_spec,
    load_student,
    load_teacher,
)
from hfkd.data import (
    CenterCrop,
    ImageDataset,
    ImageSource,
    ImageSplit,
    IndexedImageSource,
    LazyImageDataset,
    MixedImageDataset,
    NoAugmentation,
    RandomResizedCrop,
    StreamingImageDataset,
    StreamSplit,
    StrongAugmentation,
    WeakAugmentation,
    collate_batch,
    load_image_splits,
    open_streams,
)
from hfkd.errors import (
    HfkdError,
    MissingLibraryError,
    NotFoundError,
    RendezvousError,
    RunError,
    WrongTypeError,
)
from hfkd.losses import (
    LOSSES,
    ABKDLoss,
    ATLoss,
    CAMKDLoss,
    CATKDLoss,
    CCLoss,
    CRDLoss,
    CRLDLoss,
    CTKDLoss,
    DistillationLoss,
    DISTLoss,
    DKDLoss,
    FeatureQueueLoss,
    FitNetLoss,
    HardLoss,
    ITRDLoss,
    KDLoss,
    LocalityGuidanceLoss,
    MGDLoss,
    MLKDLoss,
    NKDLoss,
    NSTLoss,
    OFALoss,
    OFDLoss,
    PKTLoss,
    ReviewKDLoss,
    RKDLoss,
    RLDLoss,
    SemCKDLoss,
    SimKDLoss,
    SKDLoss,
    SPLoss,
    SRDLoss,
    SRRLLoss,
    TfKDLoss,
    TokenMSELoss,
    TTMLoss,
    USKDLoss,
    VIDLoss,
    VkDLoss,
    WSLDLoss,
    WTTMLoss,
    abkd_loss,
    at_loss,
    build_losses,
    ca_mkd_features_loss,
    ca_mkd_logits_loss,
    ca_mkd_weights,
    cat_kd_loss,
    cc_loss,
    crd_loss,
    crld_loss,
    ctkd_instance_loss,
    dist_loss,
    dkd_loss,
    feature_queue_loss,
    fitnet_loss,
    hard_loss,
    installed_losses,
    itrd_correlation_loss,
    itrd_mutual_loss,
    kd_loss,
    locality_guidance_loss,
    loss_class,
    mgd_loss,
    mlkd_loss,
    nkd_loss,
    nst_loss,
    ofa_loss,
    ofd_loss,
    ofd_margin,
    pkt_loss,
    reviewkd_loss,
    rkd_loss,
    rld_loss,
    semckd_loss,
    simkd_loss,
    skd_loss,
    sp_loss,
    srd_loss,
    srrl_loss,
    standardize,
    tf_kd_loss,
    token_mse_loss,
    ttm_loss,
    uskd_loss,
    vid_loss,
    vkd_loss,
    wsld_loss,
    wttm_loss,
)
from hfkd.losses.base import Outputs


class OwnLoss(DistillationLoss):
    """A loss of a user's own, with a temperature that it reads the teacher at."""

    takes_mixed_labels = False
    student_layers = teacher_layers = ["embedding"]

    def __init__(self, temperature: float = 2.0, weight: float = 1.0):
        super().__init__(weight)
        self.temperature = temperature

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        self.projector = nn.Linear(student.embedding.shape[1], teacher.embedding.shape[1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        student_logits, teacher_logits = self.logits(student, teacher)
        distance = (self.projector(student.embedding) - teacher.embedding).square().mean()
        return {"logits": kd_loss(student_logits, teacher_logits, self.temperature), "embedding": distance}


class FixedLoss(DistillationLoss):
    """A loss of a user's own whose temperature is an attribute of the class."""

    teacher_temperature = 1.0

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return assert_type(kd_loss(*self.logits(student, teacher), 1.0), Tensor)


def train() -> Path:
    train_split, test_split = load_image_splits("digits")
    assert_type(train_split, ImageSplit | None)
    assert_type(test_split, ImageSplit)
    student = load_student("cifar_resnet8", test_split.class_names, drop_path_rate=0.1)
    assert_type(student, PreTrainedModel)
    teacher = load_teacher("runs/digits/teacher/teacher", class_indices=range(10))
    inherit_blocks(student, teacher, {"layer1": [1], "layer2": (0,)})
    assert_type(teacher, Teacher)
    spec = input_spec(student)
    assert train_split is not None
    train_set = ImageDataset.from_split(
        train_split,
        transform=WeakAugmentation(flip=False),
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
    )
    test_set = ImageDataset(
        train_set.images,
        train_set.labels,
        train_set.class_names,
        transform=NoAugmentation(),
        mean=spec.mean,
        std=spec.std,
    )
    assert_type(train_set[0], dict[str, Tensor])
    args = DistillationConfig(
        "runs/own",
        losses={"kd": {"temperature": 2.0, "weight": 9.0}},
        logit_standardization=True,
        learning_rate=1e-3,
        num_train_epochs=5,
        lr_milestones=[2, 4],
        ema_decay=None,
    )
    assert_type(args.mixes, bool)
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=train_set,
        eval_dataset=test_set,
        losses={"kd": {"temperature": 2.0}, "dkd": None, "own": OwnLoss()},
    )
    assert_type(trainer.args, DistillationConfig)
    assert_type(trainer.model, nn.Module)
    try:
        output = trainer.train(resume_from_checkpoint=True)
    except (RunError, RendezvousError) as error:
        raise SystemExit(error.exit_code) from error
    assert_type(output, TrainOutput)
    assert_type(trainer.evaluate(), dict[str, float])
    assert_type(trainer.predict(test_set).metrics, dict[str, float] | None)
    trainer.push_to_hub(blocking=False)
    return assert_type(trainer.export(license="mit"), Path)


def train_otherwise(student: nn.Module, dataset: ImageDataset) -> None:
    """The other forms that the arguments of the trainer take."""
    labels_alone = DistillationTrainer(student, train_dataset=dataset)
    assert_type(labels_alone.train(), TrainOutput)
    args = DistillationConfig(output_dir="runs/ensemble", losses={"kd": {}})
    DistillationTrainer(student, [load_teacher("cifar_resnet56"), nn.Identity()], args, train_dataset=dataset)
    DistillationTrainer("resnet18", ["microsoft/resnet-50", nn.Identity()], args, train_dataset=dataset)
    DistillationTrainer(student, CachedTeacher(Path("cache")), args, train_dataset=dataset)
    DistillationTrainer(None, Teacher(nn.Identity(), name="own"), args, train_dataset=dataset, model_init=nn.Identity)


def arguments_of_a_recipe() -> str:
    models = ModelArguments("cifar_resnet20", teacher_name_or_path=["cifar_resnet56"])
    images = DataArguments("digits", augmentation="crop", image_size=32)
    assert_type(models.teacher_name_or_path, list[str] | None)
    assert_type(images.crop_pct, float)
    return models.student_name_or_path


def teachers(batch: dict[str, Tensor]) -> int:
    teacher = load_teacher("cifar_resnet56", checkpoint="resnet56.pth")
    assert_type(teacher(batch).logits, Tensor)
    cached = CachedTeacher("cache")
    assert_type(cached.name, str)
    return teacher.parameter_count() + cached.parameter_count()


def photographs(folder: str) -> list[ImageSource]:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    crop = RandomResizedCrop(224, mean, std, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
    center = CenterCrop(224, mean, std, crop_pct=0.875)
    train_split, test_split = load_image_splits(folder, eval_split="train[90%:]", train_split="train[:90%]")
    assert train_split is not None
    lazy: IndexedImageSource = LazyImageDataset(train_split, transform=crop, views=2, skip_bad_images=True)
    assert_type(collate_batch(lazy.__getitems__([0, 1])), dict[str, Tensor])
    streams = open_streams(folder, train_split=None)
    assert_type(streams, tuple[StreamSplit | None, StreamSplit])
    stream = StreamingImageDataset(streams[1], transform=center)
    stream.shard(rank=0, world_size=1, batch_size=64, drop_last=False)
    for batch in stream:
        assert_type(batch, dict[str, Tensor])
    others = LazyImageDataset(train_split, transform=crop)
    mixed = MixedImageDataset(lazy, others, unlabelled_images=32, batch_size=64)
    return [lazy, LazyImageDataset(test_split, transform=center), stream, mixed]


def augmented(images: Tensor, bits: np.ndarray[Any, Any]) -> Tensor:
    return StrongAugmentation(WeakAugmentation())(images, bits)


def methods() -> list[type[DistillationLoss]]:
    """Methods of hfkd and of installed packages by name, and one of a module."""
    return [loss_class(name) for name in (*LOSSES, *installed_losses(), "my_project.losses:LogitMSE")]


def losses_by_name() -> nn.ModuleDict:
    assert_type(LOSSES["kd"].citation, str)
    return build_losses({"kd": {"temperature": 4.0}, "dkd": None, "own": OwnLoss()}, logit_standardization=True)


def every_loss() -> list[DistillationLoss]:
    of_logits: list[DistillationLoss] = [
        *(KDLoss(temperature=4.0), DKDLoss(beta=2.0), MLKDLoss(), CTKDLoss(instance_wise=True), DISTLoss(), TTMLoss()),
        *(WTTMLoss(0.1), NKDLoss(), ABKDLoss(), WSLDLoss(), HardLoss(weight=0.5), RLDLoss(), CRLDLoss()),
        *(SKDLoss(damping=0.1), CAMKDLoss(features=50.0), OFALoss([1, 2], eps=1.5), KDLoss(regions=[1, 2, 4])),
        *(TfKDLoss(multiplier=50.0), USKDLoss(student_layer="layer3")),
    ]
    of_maps: list[DistillationLoss] = [
        *(LocalityGuidanceLoss([1], ["blocks.6"]), FitNetLoss(), ATLoss([1, 2], [1, 2]), SPLoss(), VIDLoss()),
        *(SemCKDLoss(batch_size=32), NSTLoss(), VkDLoss(), TokenMSELoss(), SimKDLoss(teacher_layer="embedding")),
        *(ReviewKDLoss(max_channels=256), CATKDLoss(normalize=True), MGDLoss(dropped=0.5)),
        OFDLoss(["layer1.2.act2:input"], ["layer1.8.act2:input"], ["layer1.8.bn2"]),
    ]
    of_embeddings: list[DistillationLoss] = [
        *(PKTLoss(), CRDLoss(negatives=4096), SRRLLoss(), RKDLoss(squared=True), CCLoss(), SRDLoss()),
        *(FeatureQueueLoss(size=1024), ITRDLoss()),
    ]
    return of_logits + of_maps + of_embeddings


def functions_of_logits(student: Tensor, teacher: Tensor, labels: Tensor) -> list[Tensor]:
    student, teacher = standardize(student), standardize(teacher)
    within = crld_loss(student, teacher, student, teacher, 4.0, weak_threshold=0.9, strong_threshold=0.2)
    own = uskd_loss(student, student, labels)
    directions = skd_loss(student, teacher, temperature=4.0, damping=0.1)
    weights = ca_mkd_weights([teacher, teacher], labels)
    levels = mlkd_loss(student, teacher, student, teacher, 4.0, logit_standardization=True)
    return [
        kd_loss(student, teacher, temperature=4.0),
        kd_loss(student, teacher, temperature=labels.new_ones(())),
        dkd_loss(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0),
        ctkd_instance_loss(student, teacher, temperature=student[:, 0]),
        dist_loss(student, teacher, beta=1.0, gamma=1.0, temperature=1.0),
        ttm_loss(student, teacher, exponent=0.1),
        wttm_loss(student, teacher, exponent=0.1),
        nkd_loss(student, teacher, labels, gamma=1.5, temperature=1.0),
        abkd_loss(student, teacher, alpha=0.5, beta=0.5, temperature=4.0),
        wsld_loss(student, teacher, labels, temperature=4.0, alpha=2.25),
        hard_loss(student, teacher),
        rld_loss(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0, target_temperature=1.0),
        kd_loss(student, teacher, temperature=4.0, reduction="none"),
        ofa_loss(student, teacher, labels, eps=1.5, temperature=1.0),
        tf_kd_loss(student, labels, temperature=20.0),
        ca_mkd_logits_loss([student, student], [teacher, teacher], weights, temperature=4.0),
        *assert_type(own, dict[str, Tensor]).values(),
        *assert_type(directions, dict[str, Tensor]).values(),
        *assert_type(within, dict[str, Tensor]).values(),
        *assert_type(levels, dict[str, Tensor]).values(),
    ]


def functions_of_maps(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    return [
        locality_guidance_loss(student, teacher),
        fitnet_loss(student, teacher),
        at_loss(student, teacher),
        sp_loss(student, teacher),
        vid_loss(student, [one.new_zeros(one.shape[1]) for one in teacher], teacher),
        semckd_loss([student], teacher, attention=student[0]),
        nst_loss(student, teacher),
        vkd_loss(student, teacher),
        token_mse_loss(student, teacher),
        reviewkd_loss(student, teacher),
        mgd_loss(student, teacher),
        ofd_loss(student, teacher, [ofd_margin(one[0, :, 0, 0], one[0, :, 0, 0]) for one in teacher]),
        cat_kd_loss(student[0], student[0][0, :, 0], teacher[0], teacher[0][0, :, 0], resolution=2, normalize=False),
        ca_mkd_features_loss(student, teacher, weights=student[0]),
        simkd_loss(student[0], teacher[0]),
    ]


def functions_of_embeddings(student: Tensor, teacher: Tensor, rows: Tensor, classifier: nn.Linear) -> list[Tensor]:
    value, normalizers = crd_loss(student, teacher, student, teacher, rows, rows.new_zeros(2), temperature=0.07)
    return [
        pkt_loss(student, teacher),
        srrl_loss(student, teacher, teacher, classifier),
        rkd_loss(student, teacher, distance=25.0, angle=50.0, squared=False),
        cc_loss(student, teacher),
        srd_loss(student, teacher, exponent=4.0),
        feature_queue_loss(student, teacher, queue=teacher, temperature=0.07),
        itrd_correlation_loss(student, teacher, alpha=1.5),
        itrd_mutual_loss(student, teacher),
        assert_type(value, Tensor),
        assert_type(normalizers, Tensor),
    ]


def explained(error: HfkdError) -> str:
    if isinstance(error, NotFoundError | MissingLibraryError | WrongTypeError):
        return str(error)
    return f"exit code {assert_type(error.exit_code, int)}"


def mistakes(logits: Tensor) -> None:
    """What mypy must refuse: where it does not, the comment is unused, which is an error."""
    from hfkd import load_studnt  # type: ignore[attr-defined]  # noqa: F401

    DistillationConfig("runs/own", lr_milestone=[1.0])  # type: ignore[call-arg]
    kd_loss(logits, logits)  # type: ignore[call-arg]
    KDLoss(temperature="high")  # type: ignore[arg-type]
    load_student("cifar_resnet8").no_such_method()  # type: ignore[operator]
    FixedLoss().forward(logits, logits, {})  # type: ignore[arg-type]
