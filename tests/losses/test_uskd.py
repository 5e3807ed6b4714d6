import math

import pytest
import torch
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.uskd import USKDLoss, uskd_loss
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(new_feature_golden):
    for case, settings in new_feature_golden.cases("uskd"):
        golden = {
            name: new_feature_golden.tensor(f"{case}/{name}")
            for name in ("student_logits", "weights/weight", "weights/bias")
        }
        pooled = new_feature_golden.tensor("student_pooled").clone().requires_grad_()
        logits = golden["student_logits"].clone().requires_grad_()
        student = Outputs(logits, logits, {-2: pooled[..., None, None]})
        loss = USKDLoss(settings["alpha"], settings["beta"], settings["mu"])
        loss.setup(student, None)
        loss.double()
        with torch.no_grad():
            loss.weak_classifier.weight.copy_(golden["weights/weight"])
            loss.weak_classifier.bias.copy_(golden["weights/bias"])
        value = sum(loss(student, None, {"labels": new_feature_golden.tensor("labels")}).values())
        value.backward()
        weights = {f"weights/{name}": parameter.grad for name, parameter in loss.weak_classifier.named_parameters()}
        new_feature_golden.check(case, value, student_pooled=pooled.grad, student_logits=logits.grad, **weights)


def test_three_classes_by_hand():
    """The label ranks between the classes 1 and 2, which have the ranks 1 and 3."""
    student, weak = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.6, 0.2]]).log()
    terms = uskd_loss(student, weak, torch.tensor([0]))
    assert terms["target"].item() == pytest.approx(-math.log(0.5))  # of one image, the mean is its own
    assert terms["others"].item() == pytest.approx(-0.75 * math.log(0.6) - 0.25 * math.log(0.4), rel=1e-5)
    target = [0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]
    expected = -sum(share * math.log(prob) for share, prob in zip(target, (0.2, 0.6, 0.2), strict=True))
    assert terms["weak"].item() == pytest.approx(expected, rel=1e-5)


def test_whole_shares_are_labels():
    """The second class, whose share is 0, is only left out of the others."""
    student, weak, labels = random(4, 6), random(4, 6, seed=1), torch.tensor([0, 5, 2, 2])
    whole = uskd_loss(student, weak, labels)
    shares = uskd_loss(student, weak, torch.nn.functional.one_hot(labels, 6).double())
    torch.testing.assert_close(shares["weak"], whole["weak"])
    torch.testing.assert_close(shares["target"], whole["target"])


def test_a_mixture_by_hand():
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    terms = uskd_loss(student, student, torch.tensor([[0.7, 0.3, 0.0, 0.0]]))
    assert terms["target"].item() == pytest.approx(-0.7 * math.log(0.4) - 0.3 * math.log(0.3), rel=1e-5)
    # The others have the ranks 3 and 4, so the shares 4 / 7 and 3 / 7.
    assert terms["others"].item() == pytest.approx(-(4 / 7) * math.log(2 / 3) - (3 / 7) * math.log(1 / 3), rel=1e-5)


@pytest.mark.parametrize("term", ["others", "weak"])
def test_gradcheck(term):
    """The soft label of `target` has no gradient, so its number differs from a difference quotient."""
    labels, inputs = torch.tensor([0, 4, 2, 2]), (random(4, 5), random(4, 5, seed=1))
    assert gradcheck(lambda *logits: uskd_loss(*logits, labels)[term], [one.requires_grad_() for one in inputs])


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_any_logits_give_finite_terms(scale):
    logits, labels = scale * random(4, 5).float(), torch.tensor([0, 4, 2, 2])
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    value = sum(uskd_loss(*inputs, labels).values())
    value.backward()
    assert value.isfinite() and all(one.grad.isfinite().all() for one in inputs)


def test_it_trains_without_a_teacher_on_mixed_images():
    args = config(max_steps=2, losses={"uskd": {}}, mixup=0.8, dataloader_drop_last=True)
    trainer = DistillationTrainer(load_student("cifar_resnet8", num_classes=10), None, args, train_dataset=images(16))
    before = trainer.distiller.losses["uskd"].weak_classifier.weight.detach().clone()
    trainer.train()
    log = train_logs(trainer)[-1]
    assert all(math.isfinite(log[f"loss_uskd_{term}"]) for term in ("target", "others", "weak"))
    assert not torch.equal(trainer.distiller.losses["uskd"].weak_classifier.weight, before)


def test_clear_errors():
    with pytest.raises(ValueError, match=r"three classes or more and labels .* got \(4, 2\), \(4, 2\) and \(4,\)"):
        uskd_loss(random(4, 2), random(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="student_layer is None: give a stage index or a module path"):
        USKDLoss(student_layer=None)
