import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import config, images, train_logs
from torch.autograd import gradcheck

from hfkd import DistillationTrainer, load_student
from hfkd.losses.semckd import SemCKDLoss, semckd_attention, semckd_loss, similarity_rows
from hfkd.networks.features import Outputs
from hfkd.networks.wrapping import wrap_timm

TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(maps):
    logits = random(len(maps[0]), 5)
    return Outputs(logits, logits, dict(enumerate(maps)))


def ready(student, teacher, batch_size):
    """A float64 loss over all the maps given."""
    torch.manual_seed(0)
    loss = SemCKDLoss(list(range(len(student.features))), list(range(len(teacher.features))), batch_size)
    loss.setup(student, teacher)
    return loss.double()


def student_maps(batch):
    return [0.3 * one for one in (random(batch, 3, 8, 8, seed=1), random(batch, 4, 4, 4, seed=2))]


def teacher_maps(batch):
    maps = (random(batch, 4, 8, 8, seed=3), random(batch, 5, 4, 4, seed=4), random(batch, 6, 2, 2, seed=5))
    return [0.3 * one for one in maps]


def ours(name):
    """Our name of a weight of the reference; None for those that its forward never reads."""
    module, _, rest = name.partition(".")
    kind, digits = module.rstrip("0123456789_"), module.lstrip("abcdefghijklmnopqrstuvwxyz_")
    if kind == "regressor":
        return f"projectors.{digits[0]}.{digits[1]}.{rest.removeprefix('regressor.')}"
    return None if rest.startswith("regressor") else f"{ {'query': 'queries', 'key': 'keys'}[kind] }.{digits}.{rest}"


def test_golden(feature_golden):
    own, other = feature_golden.maps("student"), feature_golden.maps("teacher")
    student, teacher = outputs(own), outputs(other)
    loss = ready(student, teacher, batch_size=6)
    weights = {ours(name): weight for name, weight in feature_golden.weights("semckd").items()}
    weights.pop(None)
    loss.load_state_dict(weights)
    expected = feature_golden.tensor("semckd/attention")
    torch.testing.assert_close(loss.attention(own, other), expected, rtol=1e-9, atol=0)
    inputs = {f"student_map_{number}": one for number, one in enumerate(own)}
    feature_golden.check("semckd/loss", loss(student, teacher, {}), **inputs)


def test_by_hand():
    """Two student maps, three of the teacher."""
    teacher = [random(4, 2, 4, 4), random(4, 3, 2, 2, seed=1), random(4, 2, 4, 4, seed=2)]
    projected = [[random(4, *one.shape[1:2], 2, 2, seed=row) for one in teacher] for row in (3, 4)]
    attention = random(4, 2, 3, seed=5).softmax(dim=2)
    expected = 0.0
    for image in range(4):
        for row in range(2):
            for column, target in enumerate(teacher):
                difference = projected[row][column][image] - F.adaptive_avg_pool2d(target, 2)[image]
                expected = expected + attention[image, row, column] * difference.pow(2).mean() / (4 * 2)
    torch.testing.assert_close(semckd_loss(projected, teacher, attention), expected)


def test_gradcheck():
    maps = random(3, 2, 4, 4).requires_grad_(), random(3, 3, 2, 2, seed=1).requires_grad_()
    teacher = [random(3, 2, 4, 4, seed=2), random(3, 3, 4, 4, seed=3)]
    queries, keys = random(3, 1, 2, seed=4).requires_grad_(), random(3, 2, 2, seed=5)
    assert gradcheck(
        lambda first, second, query: semckd_loss([[first, second]], teacher, semckd_attention(query, keys)),
        (*maps, queries),
    )
    assert gradcheck(lambda one: similarity_rows(one, 2), random(3, 2, 2, 2).requires_grad_())


@pytest.mark.parametrize("batch", [1, 5, 16, 17, 40])
def test_any_batch_size_trains_every_part(batch):
    """One image, a last partial batch, the whole one, and larger ones."""
    student, teacher = outputs(student_maps(batch)), outputs(teacher_maps(batch))
    loss = ready(student, teacher, batch_size=16)
    loss(student, teacher, {}).backward()
    assert len(list(loss.parameters())) == 5 * 4 + 2 * 3 * 7
    for name, parameter in loss.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_a_partial_batch_is_one_whose_other_images_show_nothing():
    full = [maps(8) for maps in (student_maps, teacher_maps)]
    for one in [*full[0], *full[1]]:
        one[5:] = 0
    loss = ready(outputs(full[0]), outputs(full[1]), batch_size=8)
    whole = loss.attention(*full)
    partial = loss.attention(*[[one[:5] for one in maps] for maps in full])
    assert partial.shape == (5, 2, 3)
    torch.testing.assert_close(partial, whole[:5])


@pytest.mark.parametrize("batch, groups", [(8, [8]), (9, [5, 4]), (16, [8, 8]), (17, [6, 6, 5])])
def test_a_larger_batch_is_split_into_equal_groups(batch, groups):
    own, other = student_maps(batch), teacher_maps(batch)
    loss = ready(outputs(own), outputs(other), batch_size=8)
    own_parts, other_parts = (zip(*[one.split(groups) for one in maps], strict=True) for maps in (own, other))
    expected = [loss.attention(*parts) for parts in zip(own_parts, other_parts, strict=True)]
    torch.testing.assert_close(loss.attention(own, other), torch.cat(expected))


def test_similarity_rows():
    feature = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).view(3, 2, 1, 1)
    assert similarity_rows(feature, 4).tolist() == [[5, 11, 17, 0], [11, 25, 39, 0], [17, 39, 61, 0]]
    assert similarity_rows(feature, 2).tolist() == [[5, 11], [11, 25], [61, 0]]
    assert similarity_rows(feature.bfloat16(), 4).dtype == torch.float32


def test_maps_and_embeddings_of_zeros_keep_gradients_finite():
    own, other = [torch.zeros_like(one).requires_grad_() for one in student_maps(4)], teacher_maps(4)
    student, teacher = outputs(own), outputs(other)
    loss = ready(student, teacher, batch_size=8)
    for embed in loss.queries:
        torch.nn.init.zeros_(embed.linear2.weight)
        torch.nn.init.zeros_(embed.linear2.bias)
    torch.testing.assert_close(loss.attention(own, other), torch.full((4, 2, 3), 1 / 3, dtype=torch.float64))
    loss(student, teacher, {}).backward()
    assert all(tensor.grad.abs().max() < 1e3 for tensor in [*own, *loss.parameters()])


def test_projectors_run_in_the_precision_of_the_run_and_the_rest_in_float32():
    own, other = ([one.float() for one in maps(4)] for maps in (student_maps, teacher_maps))
    student, teacher = outputs(own), outputs(other)
    loss = ready(student, teacher, batch_size=4).float()
    loss.autocast_dtype = torch.bfloat16
    seen = {}
    for name in ("projectors.0.0", "queries.0", "keys.0"):
        hook = lambda module, arguments, output, name=name: seen.update({name: output.dtype})  # noqa: E731
        loss.get_submodule(name).register_forward_hook(hook)
    assert loss(student, teacher, {}).dtype == torch.float32
    assert seen == {"projectors.0.0": torch.bfloat16, "queries.0": torch.float32, "keys.0": torch.float32}


def test_a_transformer_learns_from_a_convolutional_network_with_a_last_partial_batch():
    """Two layers of the student, all stages but the stem of the teacher; 8 and then 3 images."""
    torch.manual_seed(0)
    student = wrap_timm(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY), list("0123456789"), TINY)
    loss = SemCKDLoss(student_layers=[0, 1], batch_size=8, weight=1.0)
    teacher = load_student("cifar_resnet8", num_classes=10)
    args = config(num_train_epochs=2, weight_decay=0.0)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=images(11), losses={"semckd": loss})
    kept = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    trainer.train()
    assert (len(loss.queries), len(loss.keys)) == (2, 3)
    assert all((parameter != kept[name]).any() for name, parameter in loss.named_parameters())
    logged = [entry["loss_semckd"] for entry in train_logs(trainer)]
    assert len(logged) == 4 and logged[-1] < logged[0]


def test_clear_errors():
    assert (SemCKDLoss().weight, SemCKDLoss().batch_size, SemCKDLoss().student_layers) == (400.0, 64, None)
    for batch_size in (3, 0, 64.0, True):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}: give a whole number, 4 or above"):
            SemCKDLoss(batch_size=batch_size)
    with pytest.raises(ValueError, match="student_layers is 'layer2': give a list"):
        SemCKDLoss("layer2")
    with pytest.raises(ValueError, match=r"attention of shape \(2, 1, 1\) expected, got \(2, 1, 2\)"):
        semckd_loss([[random(2, 3, 4, 4)]], [random(2, 3, 4, 4)], random(2, 1, 2))
    with pytest.raises(ValueError, match=r"same \(B, C\), got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        semckd_loss([[random(2, 3, 4, 4)]], [random(2, 4, 4, 4)], random(2, 1, 1))
    with pytest.raises(ValueError, match=r"gives \(2, 5\); expected a map"):
        ready(outputs([random(2, 5)]), outputs([random(2, 3, 4, 4)]), 4)
