import pytest
import torch
from helpers import config, images
from torch.autograd import gradcheck
from torch.utils.data import Dataset

from hfkd import DistillationTrainer, load_student
from hfkd.losses.mgd import MGDLoss, mgd_loss
from hfkd.losses.noise import uniform_noise
from hfkd.networks.features import Outputs


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ready(student, teacher, **settings):
    """A float64 loss over one layer of each, and the outputs of the two networks."""
    logits = random(len(student), 5)
    outputs = [Outputs(logits, logits, {-1: feature}) for feature in (student, teacher)]
    loss = MGDLoss(**settings)
    loss.setup(*outputs)
    return loss.double(), outputs


def batch_of(rows, step=0):
    return {"index": torch.tensor(rows), "step": torch.tensor(step)}


def test_golden(new_feature_golden, monkeypatch):
    golden = new_feature_golden.tensor
    student = golden("mgd/student_map").clone().requires_grad_()
    loss, outputs = ready(student, golden("teacher_map_2"))
    names = {"align": "align", "generation.conv1": "generation.0", "generation.conv2": "generation.2"}
    generator = loss.generators[0]
    parameters = {
        f"{released}.{part}": generator.get_parameter(f"{name}.{part}")
        for name, released in names.items()
        for part in ("weight", "bias")
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(golden(f"mgd/weights/{name}"))
    monkeypatch.setattr(loss, "kept", lambda channels, batch: [golden("mgd/kept").flatten(1)])
    value = loss(*outputs, {})
    value.backward()
    case = "mgd/alpha=1/lambda=0.15"
    new_feature_golden.check(case, value, student_map=student.grad)
    for name, parameter in parameters.items():
        expected = golden(f"{case}/grad_weights/{name}")
        assert (parameter.grad - expected).abs().max() <= 1e-9 * expected.abs().max(), name


def test_gradcheck():
    student = [random(2, 3, 4, 4).requires_grad_(), random(2, 5, 2, 2, seed=1).requires_grad_()]
    teacher = [random(2, 3, 2, 2, seed=2), random(2, 5, 2, 2, seed=3)]
    assert gradcheck(lambda *maps: mgd_loss(maps, teacher), student)


def test_an_image_keeps_its_channels_in_any_batch():
    loss, _ = ready(random(2, 3, 2, 2), random(2, 40, 2, 2))
    (together,), (alone,) = (loss.kept([40], batch_of(rows, step=7)) for rows in ([3, 70, 5], [5]))
    assert torch.equal(together[2:], alone) and not torch.equal(together[0], together[1])
    first, second = loss.kept([16, 24], batch_of([5], step=7))
    assert torch.equal(torch.cat([first, second], dim=1), alone)
    assert not torch.equal(loss.kept([40], batch_of([5], step=8))[0], alone)
    loss.seed = 1
    assert not torch.equal(loss.kept([40], batch_of([5], step=7))[0], alone)


def test_the_noise_is_uniform_and_independent():
    noise = uniform_noise(3, torch.tensor(10), torch.arange(500), 200)
    assert noise.min() >= 0 and noise.max() < 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.005)
    assert noise.var().item() == pytest.approx(1 / 12, abs=0.002)
    later = uniform_noise(3, torch.tensor(11), torch.arange(500), 200)
    for one, other in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:]), (noise, later)):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.02


@pytest.mark.parametrize(("dropped", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_the_share_that_is_dropped(dropped, share):
    loss, _ = ready(random(2, 3, 2, 2), random(2, 64, 2, 2), dropped=dropped)
    (kept,) = loss.kept([64], batch_of([*range(200)]))
    assert 1 - kept.double().mean().item() == pytest.approx(share, abs=0.02)


def test_maps_of_equal_width_are_not_aligned():
    loss, _ = ready(random(2, 4, 2, 2), random(2, 4, 2, 2))
    assert isinstance(loss.generators[0].align, torch.nn.Identity)


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(tmp_path):
    states = []
    for folder, resume in (("one", None), ("two", tmp_path / "one" / "checkpoint-3")):
        torch.manual_seed(0)
        networks = [load_student("cifar_resnet8", num_classes=10) for _ in range(2)]
        args = config(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=3, seed=5)
        args.losses = {"mgd": {"dropped": 0.5, "weight": 1e-3}}
        trainer = DistillationTrainer(*networks, args, train_dataset=images(16))
        assert trainer.distiller.losses["mgd"].seed == 5
        trainer.train(resume and str(resume))
        states.append(trainer.distiller.state_dict())
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


def test_batches_must_name_their_rows():
    class Unnumbered(Dataset):
        def __init__(self):
            self.images = images(8)

        def __len__(self):
            return 8

        def __getitem__(self, row):
            batch = self.images.__getitems__([row])
            return {key: batch[key][0] for key in ("pixel_values", "labels")}

    networks = [load_student("cifar_resnet8", num_classes=10) for _ in range(2)]
    data = {"train_dataset": Unnumbered(), "data_collator": torch.utils.data.default_collate}
    with pytest.raises(ValueError, match="'mgd' draws noise for each image, so the batches must hold 'index'"):
        DistillationTrainer(*networks, config(losses={"mgd": {}}), **data)


def test_clear_errors():
    assert MGDLoss().student_layers == [-1] and MGDLoss().weight == 7e-5
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 4\) and \(2, 4, 4, 4\)"):
        mgd_loss([random(2, 3, 4, 4)], [random(2, 4, 4, 4)])
    with pytest.raises(ValueError, match="give lists of equal length"):
        MGDLoss([0, 1])
