"""What a step keeps in memory: nothing of the teacher but its weights, and less of a student that runs twice."""

import dataclasses
import importlib.util
import warnings
import weakref

import pytest
import timm
import torch
from helpers import ROOT, Plain, config, images, train_logs
from torch.nn.parallel import DistributedDataParallel
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hfkd import DistillationConfig, DistillationTrainer, load_student

FEATURE_METHODS = ("fitnet", "at", "sp", "vid", "pkt", "crd", "srrl", "semckd")
ROWS = 16


def load_meters():
    spec = importlib.util.spec_from_file_location("meters", ROOT / "scripts/benchmark/meters.py")
    meters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(meters)
    return meters


class CountsSaved(DistillationTrainer):
    """Counts the bytes that the last step's forward, teacher and losses included, has saved for the backward."""

    def compute_loss(self, *args, **kwargs):
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().compute_loss(*args, **kwargs)
        self.saved_bytes = sum(saved.values())
        return loss


def trainer_of(student, losses, teacher="cifar_resnet8", **changes):
    torch.manual_seed(0)
    student, teacher = student(), timm.create_model(teacher, num_classes=10)
    settings = config(max_steps=2, losses=losses, **changes)
    return CountsSaved(student, teacher, settings, train_dataset=images(ROWS))


def cifar_student():
    return load_student("cifar_resnet8", num_classes=10)


# ---- The teacher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [("kd",), ("kd", *FEATURE_METHODS), ("simkd",), ("mlkd",)], ids="+".join)
def test_a_teacher_of_any_depth_saves_nothing_for_the_backward(methods):
    """Its maps and logits have the same sizes at any depth. Its parameters are made to ask for gradients: that they
    usually do not must not be all that keeps them from getting some."""
    losses, saved = {method: {} for method in methods}, {}
    for teacher in ("cifar_resnet8", "cifar_resnet20"):
        trainer = trainer_of(cifar_student, losses, teacher)
        trainer.teacher.model.requires_grad_()
        trainer.train()
        saved[teacher] = trainer.saved_bytes
        assert all(parameter.grad is None for parameter in trainer.teacher.model.parameters())
    assert saved["cifar_resnet20"] == saved["cifar_resnet8"] > 0


def test_after_a_step_a_teacher_takes_its_weights_alone():
    trainer = trainer_of(cifar_student, {"kd": {}, "fitnet": {}, "srrl": {}})
    teacher, given = trainer.teacher, []
    for module in teacher.model.modules():
        module.register_forward_hook(lambda module, arguments, output: given.append(weakref.ref(output)))
    trainer.train()
    assert given and not any(output() is not None for output in given)
    batch = trainer.train_dataset.__getitems__(list(range(8)))
    with load_meters().LiveTensors() as live:
        outputs = teacher(batch)
        during = live.bytes
        del outputs
        after = live.bytes
    read = [tensor for tensor in teacher.model.state_dict().values() if tensor.is_floating_point()]
    assert after == sum(tensor.nbytes for tensor in read) + batch["pixel_values"].nbytes < during


def test_a_teacher_is_in_no_optimizer_and_not_in_what_is_wrapped():
    trainer = trainer_of(cifar_student, {"kd": {}, "srrl": {}})
    trainer.train()
    storage = lambda tensor: tensor.untyped_storage().data_ptr()  # noqa: E731
    teachers = set(map(storage, trainer.teacher.model.state_dict().values()))
    updated = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    wrapped = [*trainer.distiller.parameters(), *trainer.distiller.buffers()]  # what DDP and FSDP see
    assert len(updated) == len(list(trainer.distiller.parameters()))
    assert not teachers & set(map(storage, [*updated, *wrapped]))


# ---- Gradient checkpointing --------------------------------------------------------------------------------------


def transformers_vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    settings = ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=10, hidden_dropout_prob=0.1)
    return ViTForImageClassification(settings)


def transformers_resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10))


def vit(name):
    return lambda: load_student(name, num_classes=10, image_size=32, drop_path_rate=0.3)


STUDENTS = {  # with BatchNorm, with stochastic depth or dropout; the stages' maps and the embeddings are read
    "cifar": (cifar_student, {"kd": {}}),
    "two_views": (cifar_student, {"mlkd": {}}),
    "features": (cifar_student, {"kd": {}, "fitnet": {}, "at": {}, "srrl": {}}),
    "wrn": (lambda: load_student("cifar_wrn_16_1", num_classes=10), {"fitnet": {}}),
    "simkd": (cifar_student, {"simkd": {}}),
    "mobilenet": (lambda: load_student("mobilenetv1_100", num_classes=10, image_size=32), {"fitnet": {}, "srrl": {}}),
    "resnet": (lambda: load_student("resnet10t", num_classes=10, image_size=32), {"at": {"student_layers": [1, 2, 3]}}),
    "pvt": (vit("pvt_tiny"), {"kd": {}}),
    "t2t": (vit("t2t_vit_7"), {"fitnet": {"student_layers": [6], "teacher_layers": [3]}}),
    "deit": (vit("deit_tiny_distilled_patch16_224"), {"kd": {}}),
    "transformers": (transformers_vit, {"fitnet": {"student_layers": ["vit.layers.1"], "teacher_layers": [2]}}),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_checkpointing_saves_memory_and_changes_nothing(name):
    """Losses, weights, and running statistics: a layer that runs again counts once."""
    trainers = []
    for enable in (False, True):  # one after the other: each seeds dropout and augmentation
        trainers.append(trainer_of(*STUDENTS[name], gradient_checkpointing=enable))
        trainers[-1].train()
    plain, checkpointed = trainers
    assert checkpointed.saved_bytes < 0.6 * plain.saved_bytes
    for expected, given in zip(train_logs(plain), train_logs(checkpointed), strict=True):
        assert given["loss"] == expected["loss"]
    expected = plain.distiller.state_dict()
    assert expected.keys() == checkpointed.distiller.state_dict().keys()
    for key, value in checkpointed.distiller.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=key)


NAMES = ("gradient_checkpointing", "activation_checkpointing")  # before transformers 5.24, and since


@pytest.mark.parametrize("name", NAMES)
def test_both_names_of_checkpointing(name):
    """Neither makes transformers warn of what it will drop."""
    if name not in {field.name for field in dataclasses.fields(DistillationConfig)}:
        pytest.skip("transformers has no such argument before 5.24")
    plain = trainer_of(cifar_student, {"kd": {}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer = trainer_of(cifar_student, {"kd": {}}, **{name: True, f"{name}_kwargs": {"use_reentrant": False}})
        for each in (plain, trainer):
            each.train()
        again = dataclasses.replace(trainer.args)
    assert trainer.saved_bytes < 0.6 * plain.saved_bytes
    assert again.gradient_checkpointing and again.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_what_runs_again_leaves_no_features_behind():
    """The layer lies inside of what runs again, which may stop before the end of it."""
    losses = {"fitnet": {"student_layers": ["layer2.0.conv1"], "teacher_layers": [2]}}
    trainer, given = trainer_of(cifar_student, losses, gradient_checkpointing=True), []
    for module in trainer.model.modules():
        module.register_forward_hook(lambda module, arguments, output: given.append(weakref.ref(output)))
    trainer.train()
    assert given and not any(isinstance(output(), torch.Tensor) for output in given)


def test_two_runs_of_one_student():
    def train_twice(enable):
        student = cifar_student()
        buffers = dict(student.named_buffers())
        for _ in range(2):
            trainer_of(lambda: student, {"kd": {}}, gradient_checkpointing=enable).train()
        assert all(buffer is buffers[name] for name, buffer in student.named_buffers())
        return student.state_dict()

    torch.manual_seed(0)
    plain = train_twice(False)
    torch.manual_seed(0)
    torch.testing.assert_close(train_twice(True), plain, rtol=0, atol=0)


def test_checkpointing_compiled():
    plain = trainer_of(cifar_student, {"fitnet": {}})
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = trainer_of(cifar_student, {"fitnet": {}}, gradient_checkpointing=True, **settings)
    torch._dynamo.reset()  # after other compiled trainers of a process the meter itself would be compiled
    torch._dynamo.utils.counters.clear()
    for trainer in (plain, compiled):
        trainer.train()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled.saved_bytes < 0.6 * plain.saved_bytes
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict())


def test_checkpointing_under_ddp(tmp_path):
    """Each gradient is ready once, and the statistics count once."""
    trainers = [trainer_of(*STUDENTS["features"], gradient_checkpointing=enable) for enable in (False, True)]
    batch = trainers[0].train_dataset.__getitems__(list(range(8)))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for trainer in trainers:
            trainer.distiller.train()
            trainer.compute_loss(DistributedDataParallel(trainer.distiller), batch).backward()
    finally:
        torch.distributed.destroy_process_group()
    plain, checkpointed = (trainer.distiller for trainer in trainers)
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "student, losses, settings, message",
    [
        (Plain, {"kd": {}}, {}, "gradient_checkpointing: Plain does not support it"),
        (transformers_resnet, {"kd": {}}, {}, "ResNetForImageClassification does not support it"),
        (transformers_vit, {"simkd": {}}, {}, "SimKDStudent does not support it"),
        (cifar_student, {"kd": {}}, {"use_reentrant": True}, "use_reentrant must be false"),
        (cifar_student, {"kd": {}}, {"every_n_layers": 2}, "every_n_layers has no effect on CifarResNet"),
    ],
)
def test_what_cannot_be_checkpointed_is_refused(student, losses, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(student, losses, gradient_checkpointing=True, gradient_checkpointing_kwargs=settings)
