import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, Teacher, load_student
from hfkd.losses import standardize
from hfkd.losses.branch_heads import TokenHead, map_head
from hfkd.losses.ofa import OFALoss, ofa_loss
from hfkd.networks.features import Outputs
from hfkd.networks.wrapping import wrap_timm

TINY = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_golden):
    for case, settings in new_golden.cases("ofa_logit"):
        student, teacher = new_golden.inputs()
        logits = (standardize(student), standardize(teacher)) if settings["zscore"] else (student, teacher)
        value = ofa_loss(*logits, new_golden.tensor("labels"), settings["eps"], settings["T"])
        value.backward()
        new_golden.check(case, value, student=student.grad)


def check_heads(golden, case, heads, inputs, released_name):
    """Heads by stage, with the reference's weights: their logits, the loss of all, and all gradients."""
    heads = {stage: head.double() for stage, head in heads.items()}
    parameters = {
        released_name(stage, name): part for stage, head in heads.items() for name, part in head.named_parameters()
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(golden.tensor(f"{case}/weights/{name}"))
    branches = {stage: head(inputs[stage]) for stage, head in heads.items()}
    for stage, logits in branches.items():
        torch.testing.assert_close(logits, golden.tensor(f"{case}/branch_logits_{stage}"), rtol=1e-9, atol=1e-9)
    teacher, labels = golden.tensor("ofa/teacher_logits"), golden.tensor("labels")
    value = sum(ofa_loss(logits, teacher, labels, 1.5, 1.0) for logits in branches.values())
    value.backward()
    for name, parameter in parameters.items():
        expected = golden.tensor(f"{case}/eps=1.5/T=1.0/grad_weights/{name}")
        assert (parameter.grad - expected).abs().max() <= 1e-9 * expected.abs().max(), name
    return value


def test_golden_of_maps(new_feature_golden):
    maps = {
        stage: new_feature_golden.tensor(f"ofa_cnn/student_map_{stage}").clone().requires_grad_()
        for stage in (1, 2, 3, 4)
    }
    logits = random(6, 10)
    loss = OFALoss([1, 2, 3, 4], min_channels=20)
    loss.setup(Outputs(logits, logits, maps), Outputs(logits, logits))
    heads = dict(zip(maps, loss.heads, strict=True))

    def released_name(stage, name):
        number, *rest = name.split(".")
        return ".".join([str(stage), number, *(["op"] if len(rest) == 2 else []), *rest])

    value = check_heads(new_feature_golden, "ofa_cnn", heads, maps, released_name)
    gradients = {f"student_map_{stage}": one.grad for stage, one in maps.items()}
    new_feature_golden.check("ofa_cnn/eps=1.5/T=1.0", value, **gradients)


def test_golden_of_tokens(new_feature_golden):
    tokens = {stage: new_feature_golden.tensor(f"ofa_vit/student_tokens_{stage}") for stage in (2, 4)}
    heads = {2: TokenHead(16, 196, 2, 10), 4: TokenHead(16, 196, 1, 10)}
    names = {"merges": "0.fn", "blocks": "1", "classifier": "3", "qkv": "attn.qkv", "proj": "attn.proj"}

    def released_name(stage, name):
        name = name.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")
        return ".".join([str(stage), *(names.get(part, part) for part in name.split("."))])

    value = check_heads(new_feature_golden, "ofa_vit", heads, tokens, released_name)
    new_feature_golden.check("ofa_vit/eps=1.5/T=1.0", value)


def test_an_eps_of_1_is_cross_entropy():
    student, teacher, labels = random(4, 5), random(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    expected = F.cross_entropy(student / 2, F.softmax(teacher / 2, 1))
    torch.testing.assert_close(ofa_loss(student, teacher, labels, 1.0, 2.0), expected)


def test_gradcheck():
    teacher, labels = random(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    assert gradcheck(lambda logits: ofa_loss(logits, teacher, labels, 1.5, 2.0), random(4, 5).requires_grad_())


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_any_logits_give_finite_values(scale):
    logits = (scale * random(4, 5)).float().requires_grad_()
    value = ofa_loss(logits, (scale * random(4, 5, seed=1)).float(), torch.tensor([0, 4, 2, 2]), 0.5, 1.0)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize(("patches", "merges"), [(49, 0), (64, 0), (196, 1), (225, 0), (256, 1), (576, 1), (784, 2)])
def test_patches_are_merged_to_7_by_7(patches, merges):
    head = TokenHead(8, patches, 1, 5)
    assert len(head.merges) == merges and head(random(2, 1 + patches, 8).float()).shape == (2, 5)


def test_without_a_class_token_the_average_is_read():
    head = TokenHead(8, 16, 1, 5).double()
    tokens = random(2, 16, 8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(tokens), head(tokens[:, order]))


def test_a_head_halves_its_map():
    head = map_head(4, 2, 24, 10)
    assert [part.out_channels for part in head.modules() if isinstance(part, torch.nn.Conv2d)] == [
        4,
        4,
        4,
        8,
        8,
        8,
        8,
        24,
    ]
    assert head[:2](torch.randn(2, 4, 8, 8)).shape == (2, 24, 2, 2)


def vit():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY)
    return wrap_timm(model, list("0123456789"), TINY)


def cnn():
    return load_student("cifar_resnet8", num_classes=10)


@pytest.mark.parametrize(("student", "teacher"), [(cnn, vit), (vit, cnn)])
def test_every_head_learns(student, teacher):
    args = config(
        max_steps=2,
        losses={"ofa": {"eps": 1.5}},
        logit_standardization=student is vit,
        optim="adamw_torch",
        optim_args=None,
    )
    trainer = DistillationTrainer(student(), Teacher(teacher()), args, train_dataset=images(16))
    losses = trainer.distiller.losses
    before = {name: value.detach().clone() for name, value in losses.named_parameters()}
    trainer.train()
    log = train_logs(trainer)[-1]
    assert log["loss_ofa_logits"] > 0 and log["loss_ofa_branches"] > 0
    assert [name for name, value in losses.named_parameters() if torch.equal(value, before[name])] == []


def test_a_mixed_image_has_the_label_of_its_largest_share(make_batch):
    logits, teacher = random(6, 10), random(6, 10, seed=1)
    student = Outputs(logits, logits, {0: random(6, 4, 4, 4)})
    loss = OFALoss([0])
    loss.setup(student, Outputs(teacher, teacher))
    loss.double().eval()
    shares = F.one_hot(make_batch()["labels"], 10) * 0.6 + 0.04
    expected = loss(student, Outputs(teacher, teacher), make_batch())
    assert loss(student, Outputs(teacher, teacher), {"labels": shares}) == expected


def test_clear_errors():
    assert OFALoss().teacher_layers == () and OFALoss(temperature=2.0).teacher_temperature == 2
    with pytest.raises(ValueError, match=r"labels of shape \(4,\).*got \(4, 5\)"):
        ofa_loss(random(4, 5), random(4, 5), random(4, 5), 1.0, 1.0)
    with pytest.raises(ValueError, match="min_channels is -1: give a whole number, 0 or above"):
        OFALoss(min_channels=-1)
    with pytest.raises(ValueError, match="student_layers is 3: give a list"):
        OFALoss(3)
