import math

import pytest
import timm
import torch
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.pkt import PKTLoss, pkt_loss
from hfkd.networks.features import Outputs
from hfkd.networks.teacher import Teacher

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(feature_golden):
    student, teacher = feature_golden.inputs("student_pooled", "teacher_pooled")
    feature_golden.check("pkt/pooled", pkt_loss(student, teacher), student_pooled=student)


def test_gradcheck():
    teacher = random(4, 5, seed=1)
    assert gradcheck(lambda student: pkt_loss(student, teacher), random(4, 3).requires_grad_())


def test_by_hand():
    """Two orthogonal images, probabilities (2/3, 1/3), against two equal ones, (1/2, 1/2)."""
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).double(), torch.ones(2, 5).double()
    expected = (math.log(3 / 4) + math.log(3 / 2)) / 2 / 2
    assert pkt_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert pkt_loss(student, 7 * student).item() == pytest.approx(0, abs=1e-7)


def test_embeddings_of_zeros_have_moderate_gradients():
    student, teacher = random(4, 6).float().requires_grad_(), random(4, 8, seed=1).float()
    with torch.no_grad():
        student[0] = 0
        teacher[1] = 0
    value = pkt_loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    assert 0 < gradient[0].abs().max() < 10 and (gradient[2] != 0).any()


def test_opposite_embeddings_of_two_images_are_finite():
    """Their cosine similarity rounds to below -1 in some of these cases, whose probability would have no logarithm."""
    teacher = random(2, 6).float()
    for seed in range(50):
        embedding = 100 * random(1, 2048, seed=seed).float()
        student = torch.cat([embedding, -2 * embedding]).requires_grad_()
        value = pkt_loss(student, teacher)
        assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


def test_half_precision_is_widened():
    student, teacher = random(4, 6).half() * 1e3, random(4, 8, seed=1).half() * 1e3
    value = pkt_loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, pkt_loss(student.float(), teacher.float()))


def test_the_module_takes_the_embeddings():
    loss = PKTLoss()
    assert loss.student_layers == loss.teacher_layers == ["embedding"]
    assert loss.weight == 30000 and not loss.reads_logits
    logits, embeddings = random(4, 5), (random(4, 6), random(4, 8, seed=1))
    student, teacher = (Outputs(logits, logits, {"embedding": embedding}) for embedding in embeddings)
    assert loss(student, teacher, {}) == pkt_loss(*embeddings)


def test_clear_errors():
    embedding = random(4, 6)
    with pytest.raises(ValueError, match=r"of one batch expected, got \(4, 6\) and \(1, 6\)"):
        pkt_loss(embedding, embedding[:1])
    with pytest.raises(ValueError, match=r"embeddings \(B, D\) .*got \(4, 6, 1, 1\)"):
        pkt_loss(embedding[..., None, None], embedding)
    with pytest.raises(ValueError, match="weight is -1"):
        PKTLoss(weight=-1.0)


def test_a_convolutional_student_learns_from_a_transformer(tmp_path):
    torch.manual_seed(0)
    teacher = Teacher(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY))
    trainer = DistillationTrainer(
        load_student("cifar_resnet8", num_classes=10),
        teacher,
        config(tmp_path, ce_weight=0.0, num_train_epochs=6, optim="adamw_torch", optim_args=None, learning_rate=1e-3),
        train_dataset=images(8, augment=False),  # one batch, so that the terms can be compared
        losses={"pkt": PKTLoss()},
    )
    trainer.train()
    terms = [entry["loss_pkt"] for entry in train_logs(trainer)]
    assert terms[-1] < 0.9 * terms[0]
