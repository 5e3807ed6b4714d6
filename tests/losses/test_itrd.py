import pytest
import torch
from torch.autograd import gradcheck

from hfkd.losses.itrd import ITRDLoss, itrd_correlation_loss, itrd_mutual_loss
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ready(student, teacher, **settings):
    """A float64 loss and the outputs of two networks with these embeddings."""
    logits = random(len(student), 5)
    outputs = [Outputs(logits, logits, {"embedding": embedding}) for embedding in (student, teacher)]
    loss = ITRDLoss(**settings)
    loss.setup(*outputs)
    return loss.double(), outputs


@pytest.mark.parametrize(
    ("term", "case", "learnt"),
    [("correlation", "itrd/correlation/alpha_it=1.5", ["weight"]), ("mutual", "itrd/mutual", ["weight", "bias"])],
)
def test_golden(new_feature_golden, term, case, learnt):
    student = new_feature_golden.tensor("student_pooled").clone().requires_grad_()
    loss, outputs = ready(student, new_feature_golden.tensor("teacher_pooled"), correlation=1.0, mutual=1.0)
    parameters = dict(loss.projector.named_parameters())
    for name, parameter in parameters.items():
        parameter.data.copy_(new_feature_golden.tensor(f"itrd/weights/linear.{name}"))
    value = loss(*outputs, {})[term]
    value.backward()
    gradients = {f"weights/linear.{name}": parameters[name].grad for name in learnt}
    new_feature_golden.check(case, value, student_pooled=student.grad, **gradients)


def test_correlations_are_those_of_torch():
    student, teacher = random(5, 3), random(5, 3, seed=1)
    pairs = zip(student.T, teacher.T, strict=True)
    correlations = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    expected = (1 - 4 / 5 * correlations).pow(3).sum().log2()
    torch.testing.assert_close(itrd_correlation_loss(student, teacher, 1.5), expected)


def test_similarities_by_hand():
    """Two equal images of the student: S is 1/2 everywhere; J the same, if they are equal to the teacher, too."""
    student = torch.ones(2, 3)
    assert itrd_mutual_loss(student, torch.ones(2, 5)) == pytest.approx(0, abs=1e-6)
    assert itrd_mutual_loss(student, torch.eye(2)).item() == pytest.approx(1 - 1 / 2)


def test_gradcheck():
    teacher = random(4, 3, seed=1)
    assert gradcheck(lambda student: itrd_correlation_loss(student, teacher, 1.5), random(4, 3).requires_grad_())
    assert gradcheck(lambda student: itrd_mutual_loss(student, teacher), random(4, 3).requires_grad_())


def test_embeddings_of_zeros_are_finite():
    for student in (torch.zeros(4, 3), random(4, 3).float(), 1e15 * random(4, 3).float()):
        for teacher in (torch.zeros(4, 3), random(4, 3, seed=1).float(), student.clone()):
            embedding = student.clone().requires_grad_()
            value = itrd_correlation_loss(embedding, teacher, 1.5) + itrd_mutual_loss(embedding, teacher)
            value.backward()
            assert value.isfinite() and embedding.grad.isfinite().all()


def test_terms_have_their_weights():
    loss, outputs = ready(random(4, 6), random(4, 8, seed=1), correlation=3.0, mutual=0.5, alpha=2.0)
    projected, teacher = loss.projector(outputs[0].embedding), outputs[1].embedding
    terms = loss(*outputs, {})
    torch.testing.assert_close(terms["correlation"], 3 * itrd_correlation_loss(projected, teacher, 2.0))
    torch.testing.assert_close(terms["mutual"], itrd_mutual_loss(projected, teacher) / 2)
    sum(terms.values()).backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in loss.parameters())


def test_the_projector_runs_in_the_precision_of_the_run_and_the_loss_in_float32():
    loss, outputs = ready(random(4, 6).float(), random(4, 8, seed=1).float())
    loss.float().autocast_dtype = torch.bfloat16
    seen = []
    loss.projector.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    assert {term.dtype for term in loss(*outputs, {}).values()} == {torch.float32} and seen == [torch.bfloat16]


def test_clear_errors():
    loss = ITRDLoss()
    assert (loss.correlation, loss.mutual, loss.alpha, loss.weight, loss.least_images) == (2.0, 1.0, 1.5, 1.0, 2)
    with pytest.raises(ValueError, match=r"got \(4, 6\) and \(4, 5\)"):
        itrd_correlation_loss(random(4, 6), random(4, 5), 1.5)
    with pytest.raises(ValueError, match=r"two images or more expected, got \(1, 6\)"):
        itrd_correlation_loss(random(1, 6), random(1, 6), 1.5)
    with pytest.raises(ValueError, match=r"of one batch expected, got \(4, 6\) and \(3, 6\)"):
        itrd_mutual_loss(random(4, 6), random(3, 6))
    with pytest.raises(ValueError, match="alpha is 0.4: give a finite number, 0.5 or above"):
        ITRDLoss(alpha=0.4)
    with pytest.raises(ValueError, match="mutual is -1"):
        ITRDLoss(mutual=-1)
