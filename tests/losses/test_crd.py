import copy

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import Plain, config, images, train_logs
from PIL import Image
from torch.autograd import gradcheck
from torch.utils.data import Subset

from hfkd import DistillationTrainer, load_student
from hfkd.data import CenterCrop, StreamingImageDataset, open_streams
from hfkd.losses import crd
from hfkd.losses.crd import CRDLoss, crd_loss, memory_mib
from hfkd.networks.features import Outputs
from hfkd.networks.teacher import Teacher
from hfkd.networks.wrapping import wrap_timm

# Classes of nine rows; two are not trained on.
LABELS = torch.tensor([4, 0, 4, -100, 1, 4, 0, -100, 4])


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=1)


def outputs(embedding):
    logits = random(len(embedding), 5)
    return Outputs(logits, logits, {"embedding": embedding})


def ready(labels=LABELS, student_width=8, teacher_width=6, **arguments):
    """A loss of small parts that is set up."""
    torch.manual_seed(0)
    loss = CRDLoss(**({"negatives": 7, "dimension": 4} | arguments))
    loss.setup_rows(labels)
    loss.setup(outputs(random(2, student_width)), outputs(random(2, teacher_width)))
    return loss


def class_of(loss, labels):
    """The class of each row of the memories."""
    classes = torch.full((len(loss.student_memory),), -1)
    trained = labels >= 0
    classes[loss.places[trained, 0]] = labels[trained]
    assert (classes >= 0).all()
    return classes


# ---- The published numbers -------------------------------------------------------------------------------------------


def golden_loss(golden):
    """The loss with the reference's weights, of 50 rows in two classes, that contrasts the rows of the golden case."""
    weights = golden.weights("crd/before")
    loss = ready(torch.arange(50) // 25, 8, 16, negatives=20, dimension=12).double()
    assert torch.equal(loss.places[:, 0], torch.arange(50))  # the golden rows are those of the memories
    with torch.no_grad():
        for layer, name in ((loss.embed_student, "embed_s"), (loss.embed_teacher, "embed_t")):
            layer.weight.copy_(weights[f"{name}.linear.weight"])
            layer.bias.copy_(weights[f"{name}.linear.bias"])
        loss.student_memory.copy_(weights["contrast.memory_v1"])
        loss.teacher_memory.copy_(weights["contrast.memory_v2"])
    loss.draw = lambda index: golden.tensor("crd/contrast_index")
    return loss


def test_golden(feature_golden):
    """Two steps with the same images; the golden memories are those between them."""
    loss = golden_loss(feature_golden)
    batch = {"index": feature_golden.tensor("crd/index")}
    student, teacher = feature_golden.inputs("student_pooled", "teacher_pooled")
    value = loss(outputs(student), outputs(teacher), batch)
    feature_golden.check("crd/first_batch", value, student_pooled=student)

    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss.student_memory, feature_golden.tensor("crd/memory_v1_after"), **close)
    torch.testing.assert_close(loss.teacher_memory, feature_golden.tensor("crd/memory_v2_after"), **close)
    negatives, temperature, *normalizers, momentum = feature_golden.tensor("crd/params_after")
    torch.testing.assert_close(loss.log_normalizers.exp(), torch.stack(normalizers), **close)
    assert (negatives, temperature, momentum) == (loss.negatives, loss.temperature, loss.momentum)

    value = loss(outputs(student), outputs(teacher), batch)
    assert value.item() == pytest.approx(feature_golden.values["crd/second_batch"], rel=1e-9, abs=0)
    torch.testing.assert_close(loss.log_normalizers.exp(), torch.stack(normalizers), **close)


def test_gradcheck():
    memories = unit(9, 3, seed=2), unit(9, 3, seed=3)
    rows = torch.tensor([[2, 5, 5, 0], [8, 1, 3, 4]])  # one negative comes twice
    normalizers = torch.tensor([1.5, 2.5]).double()
    embeddings = unit(2, 3).requires_grad_(), unit(2, 3, seed=1).requires_grad_()
    assert gradcheck(lambda *given: crd_loss(*given, *memories, rows, normalizers, 0.5)[0], embeddings)


def test_by_hand():
    student, teacher, memories = unit(2, 3), unit(2, 3, seed=1), (unit(9, 3, seed=2), unit(9, 3, seed=3))
    rows = torch.tensor([[2, 5, 5, 0], [8, 1, 3, 4]])
    unset = torch.full((2,), torch.nan).double()
    value, normalizers = crd_loss(student, teacher, *memories, rows, unset, 0.5)
    expected = 0.0
    for log_normalizer, own, memory in zip(normalizers, (student, teacher), memories[::-1], strict=True):
        scores = torch.einsum("bkd,bd->bk", memory[rows], own).div(0.5).exp()
        assert log_normalizer.exp().item() == pytest.approx(9 * scores.mean().item(), rel=1e-12)
        share, noise = scores / log_normalizer.exp(), 3 / 9
        found = share[:, 0] / (share[:, 0] + noise + 1e-7)
        rejected = noise / (share[:, 1:] + noise + 1e-7)
        expected = expected - (found.log().sum() + rejected.log().sum()) / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_low_temperatures_and_half_precision():
    """exp(1 / 0.005) is beyond float32, and so would h be."""
    memories = [unit(9, 3, seed=seed).float() for seed in (2, 3)]
    rows, unset = torch.tensor([[2, 5, 5, 0], [8, 1, 3, 4]]), torch.full((2,), torch.nan)
    student, teacher = memories[1][[2, 8]].half().requires_grad_(), memories[0][[2, 8]].half().requires_grad_()
    value, _ = crd_loss(student, teacher, *memories, rows, unset, 0.005)
    assert value.dtype == torch.float32
    wide = [tensor.detach().double() for tensor in (student, teacher, *memories)]
    torch.testing.assert_close(value, crd_loss(*wide, rows, unset.double(), 0.005)[0].float())
    value.backward()
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_class():
    loss = ready()
    assert class_of(loss, LABELS).tolist() == [0, 0, 1, 4, 4, 4, 4]
    with pytest.raises(IndexError):  # a row that is not trained on has no memory
        loss.student_memory[loss.places[3, 0]]


def test_negatives_are_uniform_over_the_other_classes():
    number = 20000
    loss = ready(negatives=number)
    index = torch.tensor([0, 6, 4, 1])
    rows = loss.draw(index)
    assert rows.shape == (4, 1 + number) and torch.equal(rows[:, 0], loss.places[index, 0])
    classes = class_of(loss, LABELS)
    for label, drawn in zip(LABELS[index], rows[:, 1:], strict=True):
        counts = drawn.bincount(minlength=7)
        others = classes != label
        assert (counts[~others] == 0).all()
        share = 1 / others.sum().item()
        deviation = (number * share * (1 - share)) ** 0.5
        assert ((counts[others] - number * share).abs() < 5 * deviation).all()
    assert not torch.equal(rows[1, 1:], rows[3, 1:])  # two samples of one class draw apart
    assert not torch.equal(rows, loss.draw(index))


def test_relaxed_positives_are_uniform_over_the_class():
    loss = ready(relaxed_positives=True)
    index = torch.tensor([8, 6, 4]).repeat(4000)
    rows = loss.draw(index).view(4000, 3, 8)
    classes = class_of(loss, LABELS)
    assert torch.equal(classes[rows[:, :, 0]], LABELS[[8, 6, 4]].expand(4000, 3))
    assert (classes[rows[:, :, 1:]] != LABELS[[8, 6, 4]].view(3, 1)).all()
    counts = rows[:, 0, 0].bincount(minlength=7)[3:]
    assert ((counts - 1000).abs() < 5 * (4000 * 0.25 * 0.75) ** 0.5).all()


def test_the_global_generator_draws():
    """Its state is in Trainer's checkpoints."""
    loss, index = ready(), torch.tensor([0, 6])
    torch.manual_seed(3)
    first = loss.draw(index)
    torch.manual_seed(3)
    assert torch.equal(loss.draw(index), first)


# ---- The memories ----------------------------------------------------------------------------------------------------


def test_a_row_that_comes_twice_takes_the_last():
    loss = ready(momentum=0.25)
    before = loss.student_memory.clone(), loss.teacher_memory.clone()
    index = torch.tensor([5, 1, 5, 0, 5])
    student, teacher = unit(5, 4).float(), unit(5, 4, seed=1).float()
    loss.remember(index, student, teacher)
    memories = (loss.student_memory, loss.teacher_memory)
    for memory, old, embeddings in zip(memories, before, (student, teacher), strict=True):
        expected = old.clone()
        for row, embedding in ((1, embeddings[1]), (0, embeddings[3]), (5, embeddings[4])):
            place = loss.places[row, 0]
            expected[place] = F.normalize(0.25 * old[place] + 0.75 * embedding, dim=0)
        torch.testing.assert_close(memory, expected)
        assert (memory != old).any(dim=1).sum() == 3


def test_normalizing_constants_are_the_mean_over_processes(monkeypatch):
    loss, batch = ready(), {"index": torch.tensor([0, 1])}
    alone = copy.deepcopy(loss)
    features = outputs(random(2, 8).float()), outputs(random(2, 6).float())
    torch.manual_seed(1)
    alone(*features, batch)
    # As if there were a second process, whose Z is three times as large.
    monkeypatch.setattr(crd, "all_processes", lambda own: torch.cat([own, own + torch.tensor(3.0).log()]))
    monkeypatch.setattr(CRDLoss, "remember", lambda *arguments: None)
    torch.manual_seed(1)
    loss(*features, batch)
    torch.testing.assert_close(loss.log_normalizers.exp(), 2 * alone.log_normalizers.exp())


def test_state():
    """Equal initial memories wherever they are made; in the state what the labels do not tell."""
    loss, other = ready(), CRDLoss(dimension=4)
    torch.manual_seed(5)
    other.setup_rows(LABELS)
    assert torch.equal(loss.student_memory, other.student_memory)
    assert torch.equal(loss.teacher_memory, other.teacher_memory)
    assert not torch.equal(loss.student_memory, loss.teacher_memory)
    assert 0.7 < loss.student_memory.abs().max() < (3 / 4) ** 0.5
    learnt = {f"embed_{role}.{part}" for role in ("student", "teacher") for part in ("weight", "bias")}
    assert loss.state_dict().keys() == learnt | {"student_memory", "teacher_memory", "log_normalizers"}
    assert {name for name, _ in loss.named_buffers()} == set(loss.replicated_buffers)


@pytest.mark.parametrize("rows, mib", [(50_000, 48.8), (1_281_167, 1251.1)])
def test_memory_of_cifar_and_imagenet(rows, mib):
    assert memory_mib(rows, 128) == pytest.approx(mib, abs=0.05)


def test_16384_negatives_of_cifar(capsys):
    loss = ready(torch.arange(50_000) % 100, negatives=16384, dimension=128)
    assert capsys.readouterr().out == "CRD: the memories of 50,000 images take 48.8 MiB.\n"
    held = sum(memory.nbytes for memory in (loss.student_memory, loss.teacher_memory)) / 2**20
    assert held == memory_mib(50_000, 128)
    student = random(4, 8).float().requires_grad_()
    value = loss(outputs(student), outputs(random(4, 6).float()), {"index": torch.tensor([7, 49_999, 0, 31])})
    value.backward()
    assert value.isfinite() and (student.grad.abs().sum(dim=1) > 0).all()


# ---- As a part of training -------------------------------------------------------------------------------------------


def test_every_learnable_part_moves():
    loss = ready(relaxed_positives=True)
    student, teacher = outputs(random(3, 8).float()), outputs(random(3, 6).float())
    loss(student, teacher, {"index": torch.tensor([0, 1, 4])}).backward()
    assert len(list(loss.parameters())) == 4
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


def test_nothing_in_a_step_reads_a_value():
    """A step runs on tensors without values, so on a GPU it waits for none."""
    loss = ready(relaxed_positives=True).to("meta")
    loss.autocast = lambda device: torch.autocast("cpu", enabled=False)  # it does not know the device
    student, teacher = (outputs(random(3, width).float().to("meta")) for width in (8, 6))
    student.embedding.requires_grad_()
    loss(student, teacher, {"index": torch.zeros(3, dtype=torch.int64, device="meta")}).backward()
    assert student.embedding.grad.shape == (3, 8)


def test_bf16_projects_in_bf16_and_compares_in_float32():
    loss, batch = ready(), {"index": torch.tensor([0, 1, 4])}
    loss.autocast_dtype = torch.bfloat16
    features = outputs(random(3, 8).float()), outputs(random(3, 6).float())
    seen = []
    loss.embed_student.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    assert loss(*features, batch).dtype == torch.float32 and seen == [torch.bfloat16]
    assert loss.student_memory.dtype == torch.float32


TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.mark.parametrize("vit_learns", [True, False])
def test_mixed_families(vit_learns):
    """Trained on a part of the data set, whose rows alone are remembered."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY)
    cnn = load_student("cifar_resnet8", num_classes=10)
    student, teacher = (wrap_timm(vit, list("0123456789"), TINY), cnn) if vit_learns else (cnn, Teacher(vit))
    loss = CRDLoss(negatives=20, dimension=16)
    part = Subset(images(24), list(range(4, 20)))
    trainer = DistillationTrainer(student, teacher, config(), train_dataset=part, losses={"crd": loss})
    before = copy.deepcopy(loss.state_dict())
    trainer.train()
    assert loss.student_memory.shape == (16, 16)
    for name, value in loss.state_dict().items():
        moved = value != before[name]
        assert (moved.any(dim=1) if name.endswith("memory") else moved.any()).all(), name
    assert [entry["loss_crd"] > 0 for entry in train_logs(trainer)] == [True, True]


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"negatives": 0}, "negatives is 0: give a whole number, 1 or above"),
        ({"negatives": 2.5}, "negatives is 2.5: give a whole number"),
        ({"dimension": 0}, "dimension is 0: give a whole number, 1 or above"),
        ({"temperature": 0}, "temperature is 0: give a finite number above 0"),
        ({"momentum": -0.1}, "momentum is -0.1: give a finite number, 0 or above"),
        ({"momentum": 1}, "momentum is 1: give a number below 1"),
    ],
)
def test_parameters_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        CRDLoss(**arguments)


def test_shapes_that_do_not_fit():
    rows, normalizers = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2)
    embedding, memory = unit(2, 3), unit(9, 3)
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 3\), \(9, 3\), \(9, 4\), \(2, 4\)"):
        crd_loss(embedding, embedding, memory, unit(9, 4), rows, normalizers, 0.1)
    with pytest.raises(ValueError, match=r"contrast rows \(B, 1 \+ K\) expected, got .*\(1, 4\)"):
        crd_loss(embedding, embedding, memory, memory, rows[:1], normalizers, 0.1)


def test_without_rows():
    features = outputs(random(2, 8).float()), outputs(random(2, 6).float())
    loss = CRDLoss(dimension=4)
    loss.setup(*features)
    with pytest.raises(ValueError, match="Call `setup_rows` with the labels first"):
        loss(*features, {"index": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match=r"put 'index', .* into the batch. The batch holds \['labels'\]"):
        ready()(*features, {"labels": torch.tensor([0, 1])})


def test_one_class():
    one = Subset(images(20), [3, 13])
    with pytest.raises(ValueError, match="losses.crd: negatives are images of other classes, and .* has 1 class"):
        DistillationTrainer(Plain(), Plain(), config(), train_dataset=one, losses={"crd": CRDLoss()})


def test_mixup_is_refused():
    with pytest.raises(ValueError, match="The loss 'crd' needs one class for each image"):
        DistillationTrainer(
            Plain(),
            Plain(),
            config(mixup=0.8, dataloader_drop_last=True),
            train_dataset=images(),
            losses={"crd": CRDLoss(negatives=4)},
        )


def test_a_stream_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns = {"image": [Image.fromarray(np.full((9, 9, 3), i, np.uint8)) for i in range(8)], "label": [0, 1] * 4}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    table = datasets.Dataset.from_dict(columns, features=features)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table.to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    transform = CenterCrop(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    stream = StreamingImageDataset(open_streams(str(tmp_path / "data"))[0], transform=transform)
    with pytest.raises(ValueError, match="losses.crd: it remembers every .*StreamingImageDataset.* streaming to false"):
        DistillationTrainer(Plain(2), Plain(2), config(), train_dataset=stream, losses={"crd": CRDLoss()})


def test_a_data_set_without_rows_is_refused():
    class Bare(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {"pixel_values": torch.zeros(3, 32, 32), "labels": torch.tensor(i)}

    with pytest.raises(ValueError, match="losses.crd: .* a Bare does not know them"):
        DistillationTrainer(Plain(), Plain(), config(), train_dataset=Bare(), losses={"crd": CRDLoss()})
