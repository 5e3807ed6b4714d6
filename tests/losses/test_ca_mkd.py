import pytest
import torch
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses import standardize
from hfkd.losses.ca_mkd import CAMKDLoss, ca_mkd_features_loss, ca_mkd_logits_loss, ca_mkd_weights
from hfkd.losses.kd import kd_loss

TEACHERS = range(3)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def resnet(name="cifar_resnet8"):
    return load_student(name, num_classes=10)


def trainer(*teachers, **changes):
    args = config(**({"max_steps": 1, "losses": {"ca_mkd": {}}} | changes))
    return DistillationTrainer(resnet(), list(teachers), args, train_dataset=images(8))


def test_golden(new_feature_golden):
    golden = new_feature_golden.tensor
    weights = ca_mkd_weights([golden(f"camkd/teacher_logits_{k}") for k in TEACHERS], golden("labels"))
    torch.testing.assert_close(weights, golden("camkd/teacher_weights"), rtol=1e-9, atol=0)
    student = [golden(f"camkd/student_map_{k}").clone().requires_grad_() for k in TEACHERS]
    value = ca_mkd_features_loss(student, [golden(f"camkd/teacher_map_{k}") for k in TEACHERS], weights)
    value.backward()
    new_feature_golden.check("camkd", value, **{f"student_map_{k}": student[k].grad for k in TEACHERS})


def test_equally_sure_teachers_weigh_alike():
    logits, labels = random(4, 5), torch.tensor([0, 4, 2, 2])
    weights = ca_mkd_weights([logits] * 3, labels)
    torch.testing.assert_close(weights, torch.full((3, 4), 1 / 3, dtype=torch.float64))
    teacher, student = random(4, 5, seed=1), random(4, 5, seed=2)
    value = ca_mkd_logits_loss([student] * 3, [teacher] * 3, weights, 4.0)
    torch.testing.assert_close(value, kd_loss(student, teacher, 4.0) / 3)


def test_the_surer_teacher_weighs_more_and_shares_are_labels():
    labels = torch.tensor([0, 1])
    sure = 5 * torch.nn.functional.one_hot(labels, 3).double()
    weights = ca_mkd_weights([sure, torch.zeros(2, 3, dtype=torch.float64)], labels)
    assert (weights[0] > 0.7).all() and torch.allclose(weights.sum(0), torch.ones(2, dtype=torch.float64))
    shares = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(ca_mkd_weights([sure, torch.zeros_like(sure)], shares), weights)


def test_gradcheck():
    weights, labels = torch.rand(2, 3, dtype=torch.float64), torch.tensor([0, 4, 2])
    maps = [random(3, 4, 2, 2).requires_grad_(), random(3, 5, 4, 4, seed=1).requires_grad_()]
    teacher = [random(3, 4, 4, 4, seed=2), random(3, 5, 4, 4, seed=3)]
    assert gradcheck(lambda *own: ca_mkd_features_loss(own, teacher, weights), maps)
    logits, others = random(3, 5).requires_grad_(), [random(3, 5, seed=1), random(3, 5, seed=2)]
    assert gradcheck(lambda own: ca_mkd_logits_loss([own, own], others, weights, 2.0), logits)
    assert gradcheck(lambda own: ca_mkd_weights([own, others[0]], labels), logits)


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_finite_for_any_logits(scale):
    logits, others = random(3, 5).float(), [scale * random(3, 5, seed=seed).float() for seed in (1, 2)]
    student = (scale * logits).requires_grad_()
    weights = ca_mkd_weights(others, torch.tensor([0, 2, 4]))
    value = ca_mkd_logits_loss([student, student], others, weights, 2.0)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and weights.isfinite().all()


@pytest.mark.parametrize("zscore", [False, True])
def test_several_teachers_teach_together(zscore):
    """Of other depth and width, and with other losses beside it."""
    losses = {"kd": {}, "ca_mkd": {"temperature": 2.0}}
    networks = resnet("cifar_resnet14"), resnet("cifar_resnet8x4")
    trained = trainer(*networks, losses=losses, logit_standardization=zscore)
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in next(iter(trained.get_train_dataloader())).items()
    }
    batch["pixel_values"] = batch["pixel_values"].float()
    outputs = trained.teacher(batch)
    for member, network in zip(outputs.members, networks, strict=True):
        torch.testing.assert_close(member.logits, network.eval()(batch["pixel_values"]).logits)
        torch.testing.assert_close(member.averaged_map.mean((2, 3)), member.embedding)
    trained.distiller.eval()
    student = trained.distiller.predict(batch)
    terms = trained.distiller.losses["ca_mkd"](student, outputs, batch)
    weights = ca_mkd_weights([member.logits for member in outputs.members], batch["labels"])
    logits = [student.logits, *(member.logits for member in outputs.members)]
    own, *others = [standardize(one) for one in logits] if zscore else logits
    torch.testing.assert_close(terms["logits"], ca_mkd_logits_loss([own] * 2, others, weights, 2.0))
    before = {name: value.detach().clone() for name, value in trained.distiller.losses.named_parameters()}
    trained.train()
    log = train_logs(trained)[-1]
    assert log["loss_ca_mkd_logits"] > 0 and log["loss_ca_mkd_features"] > 0 and log["loss_kd"] > 0
    still = [name for name, value in trained.distiller.losses.named_parameters() if torch.equal(value, before[name])]
    # The gradient of a bias before BatchNorm is 0.
    assert [name for name in still if not name.endswith("conv.bias")] == []


def test_one_teacher_is_too_few():
    with pytest.raises(ValueError, match="losses.ca_mkd: CA-MKD weighs several teachers, and this run has one"):
        trainer(resnet())


def test_other_losses_still_read_no_layers_of_an_ensemble():
    with pytest.raises(ValueError, match="an ensemble .* has no layers in common"):
        trainer(resnet(), resnet(), losses={"ca_mkd": {}, "at": {}})


def test_clear_errors():
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        ca_mkd_features_loss([random(2, 3, 4, 4)], [random(2, 4, 4, 4)], torch.ones(1, 2))
    with pytest.raises(ValueError, match="features is -1"):
        CAMKDLoss(features=-1.0)
