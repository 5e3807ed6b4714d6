"""Teachers with folded batch norms: the same logits, and only where nothing else is read."""

import copy

import pytest
import timm
import torch
from helpers import config, images, train_logs
from timm.layers import BatchNormAct2d
from torch import nn

from hfkd import CachedTeacher, DistillationTrainer, Teacher, load_student
from hfkd.networks import folding
from hfkd.networks.features import EMBEDDING, InputSpec
from hfkd.networks.folding import fold_norms
from hfkd.teacher_cache.rows import RowFormat
from hfkd.teacher_cache.writing import write_cache

CPU = torch.device("cpu")
SPEC = InputSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
# With a batch norm before a convolution, with an activation inside, with several branches, and beside attention.
TIMM = ["densenet121", "efficientnet_b0", "repvgg_a0", "mobilevit_xxs"]


def with_statistics(model):
    """Batch norms as after a training: no two channels alike."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_var.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.1)
    return model.eval()


def noise(count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def norms_of(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", [*timm.list_models("cifar_*"), *TIMM])
def test_logits_are_the_same(name):
    torch.manual_seed(0)
    model = with_statistics(timm.create_model(name, num_classes=10))
    given = noise(1, size=32 if name.startswith("cifar") else 64)
    folded, norms = fold_norms(model, given)
    assert 0 < norms == norms_of(model) - norms_of(folded)
    if name.startswith("cifar") and "wrn" not in name:  # a wide ResNet has its batch norms before the convolutions
        assert norms_of(folded) == 0
    with torch.no_grad():
        expected = model(given)
        assert ((folded(given) - expected).norm() / expected.norm()).item() < 2e-5


class Twice(nn.Module):
    """Network with a convolution that is followed by a batch norm, of which `use` makes the embedding."""

    def __init__(self, use, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.fc, self.use = norm(8), nn.Linear(8, 10), use

    def forward(self, pixel_values):
        return self.fc(self.use(self, pixel_values).mean(dim=(2, 3)))


def read_twice(net, pixels):
    made = net.conv(pixels)
    return net.norm(made) + made


def changed_in_place(net, pixels):
    made = net.conv(pixels)
    made.add_(1)
    return net.norm(made)


def called_twice(net, pixels):
    return net.norm(net.conv(pixels)) + net.conv(pixels.flip(-1))


def normed_twice(net, pixels):
    return net.norm(net.other(net.norm(net.conv(pixels))))


def activated_between(net, pixels):
    return net.norm(net.conv(pixels).relu())


@pytest.mark.parametrize("use", [read_twice, changed_in_place, called_twice, normed_twice, activated_between])
def test_what_cannot_be_folded_is_not(use):
    model = with_statistics(Twice(use))
    folded, norms = fold_norms(model, noise())
    assert norms == 0 and torch.equal(folded(noise()), model(noise()))


def test_the_activation_of_a_norm_stays():
    model = with_statistics(Twice(lambda net, pixels: net.norm(net.conv(pixels)), BatchNormAct2d))
    folded, norms = fold_norms(model, noise())
    assert norms == 1
    torch.testing.assert_close(folded(noise()), model(noise()), rtol=1e-5, atol=1e-6)


def resnet():
    torch.manual_seed(0)
    return with_statistics(load_student("cifar_resnet8", num_classes=10))


def prepared(model, dtype=torch.bfloat16, **arguments):
    teacher = Teacher(model, input_spec=SPEC)
    teacher.prepare(CPU, dtype, True, **arguments)
    return teacher


def test_a_teacher_is_folded_where_only_logits_and_embedding_are_read():
    model = resnet()
    before, batch = copy.deepcopy(model.state_dict()), {"pixel_values": noise(4)}
    folded, embedding = prepared(model), prepared(model, layers=[EMBEDDING])
    assert folded.is_folded and embedding.is_folded
    assert torch.equal(folded(batch).logits, embedding(batch).logits) and embedding(batch).embedding.shape == (4, 64)
    tapped, exact = prepared(model, layers=["layer1"]), prepared(model, dtype=None)
    assert not tapped.is_folded and not exact.is_folded
    expected = exact(batch).logits
    errors = [(teacher(batch).logits - expected).norm() / expected.norm() for teacher in (folded, tapped)]
    assert 0 < errors[0] < 2.5 * errors[1] < 0.05
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert folded.parameter_count() == tapped.parameter_count()
    folded.prepare(CPU, torch.bfloat16, True, layers=["layer1"])  # for another trainer
    assert torch.equal(folded(batch).logits, tapped(batch).logits)


class ReadsItsNorm(Twice):
    def forward(self, pixel_values):
        return super().forward(pixel_values) * self.norm.weight.sum()


@pytest.mark.parametrize("kind, reason", [(ReadsItsNorm, "no attribute 'weight'"), (Twice, "1 batch norms folded")])
def test_the_plain_network_stays_where_folding_fails_or_is_inexact(kind, reason, monkeypatch):
    if kind is Twice:
        monkeypatch.setattr(folding, "MULTIPLE", 0.0)
    told = []
    monkeypatch.setattr("hfkd.networks.teacher.logger.warning", told.append)
    model = with_statistics(kind(lambda net, pixels: net.norm(net.conv(pixels))))
    teacher = prepared(model)
    assert not teacher.is_folded and len(told) == 1 and reason in told[0]
    assert teacher({"pixel_values": noise()}).logits.isfinite().all()


def distilled(output_dir="run", resume=None, **changes):
    torch.manual_seed(3)
    args = config(output_dir, losses={"kd": {}}, num_train_epochs=2, bf16=True, save_steps=3, **changes)
    student = load_student("cifar_resnet8", num_classes=10)
    trainer = DistillationTrainer(
        student, Teacher(resnet(), input_spec=SPEC), args, train_dataset=images(32), eval_dataset=images(16)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_resumed_runs_and_caches_are_those_of_the_live_teacher():
    whole = distilled(save_strategy="steps")
    assert whole.teacher.is_folded
    resumed = distilled("resumed", resume="run/checkpoint-3", save_strategy="no")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert train_logs(whole)[-1]["loss"] == train_logs(resumed)[-1]["loss"]

    train_set, args = images(9), config(bf16=True)
    teacher = Teacher(resnet(), input_spec=SPEC)
    files = write_cache("cache", teacher, train_set, images(8), args, RowFormat(10, 1, None, ()), epochs=1)
    assert files.facts["folded"] == [True]
    train_set.cache = None
    expected = whole.teacher(train_set.__getitems__(list(range(9)))).logits.half().float()
    train_set.cache = files
    assert torch.equal(CachedTeacher("cache")(train_set.__getitems__(list(range(9)))).logits, expected)
