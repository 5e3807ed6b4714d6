"""mixup and CutMix: what the networks see, what the losses read."""

import pytest
import torch
from helpers import Plain, config, images, train_logs
from torch import nn
from torch.nn import functional as F

from hfkd import DistillationTrainer
from hfkd.losses import LOSSES

MIXING = {"dataloader_drop_last": True, "per_device_train_batch_size": 8}


class Recorder(nn.Module):
    """Remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.inner, self.given = Plain(), []

    def forward(self, pixel_values):
        self.given.append(pixel_values.detach().clone())
        return self.inner(pixel_values)


def build(output_dir="run", losses=None, **changes):
    torch.manual_seed(0)
    args = config(output_dir, losses={"kd": {}} if losses is None else losses, **(MIXING | changes))
    return DistillationTrainer(Recorder(), Recorder(), args, train_dataset=images(24, augment=False))


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_both_networks_see_the_mixed_image(mixing):
    trainer = build(**mixing)
    trainer.train()
    student, teacher = trainer.model.given[-3:], trainer.teacher.model.given[-3:]
    for own, other in zip(student, teacher, strict=True):
        assert torch.equal(own, other)
    originals = trainer.train_dataset.__getitems__(range(24))["pixel_values"]
    assert not any((image == originals).flatten(1).all(1).any() for image in torch.cat(student))


def test_the_cross_entropy_takes_the_shares():
    """A mixture of a batch and its mirror image: the labels are mixed as the pixels are."""
    trainer = build(losses={}, mixup=0.8)
    batch = trainer.train_dataset.__getitems__(range(8))
    original = batch["pixel_values"].clone()
    _, terms = trainer.compute_loss(trainer.distiller, batch, return_outputs=True)
    mixed = trainer.model.given[-1]
    share = ((mixed - original.flip(0)) / (original - original.flip(0)))[0, 0, 0, 0]
    one_hot = F.one_hot(batch["labels"], 10)
    labels = share * one_hot + (1 - share) * one_hot.flip(0)
    expected = F.cross_entropy(trainer.model.inner(mixed), labels)
    torch.testing.assert_close(terms["loss_ce"], expected, rtol=1e-4, atol=1e-4)


def test_resumed_is_identical():
    settings = {"mixup": 0.8, "cutmix": 1.0, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    whole, resumed = build("whole", **settings), build("resumed", **settings)
    whole.train()
    resumed.train(resume_from_checkpoint="whole/checkpoint-2")
    for name, value in whole.model.inner.state_dict().items():
        assert torch.equal(value, resumed.model.inner.state_dict()[name])


@pytest.mark.parametrize(
    "losses",
    [{"kd": {}}, {"ctkd": {}}, {method: {"dominant_label": True} for method in ("dkd", "rld", "tf_kd")}],
    ids=lambda losses: "-".join(losses),
)
@pytest.mark.parametrize("standardization", [False, True])
def test_losses_train_on_mixtures(losses, standardization):
    trainer = build(losses=losses, mixup=0.8, cutmix=1.0, logit_standardization=standardization)
    trainer.train()
    values = [value for log in train_logs(trainer) for key, value in log.items() if "loss" in key]
    assert len(values) == 3 * (2 + len(losses)) and torch.tensor(values).isfinite().all()


@pytest.mark.parametrize("method", ["dkd", "rld", "tf_kd"])
def test_the_dominant_label_of_a_mixture(method):
    """The loss of the class with the largest share."""
    loss = LOSSES[method](dominant_label=True)
    shares = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0.4, 0.6, 0, 0], [0, 0, 0, 0, 1.0]])
    outputs = [type("Outputs", (), {"logits": torch.randn(3, 5), "strong": None})() for _ in range(2)]
    mixed, plain, other = (
        loss(*outputs, {"labels": labels, "progress": torch.tensor(0.0)})
        for labels in (shares, torch.tensor([0, 2, 4]), torch.tensor([1, 2, 4]))
    )
    torch.testing.assert_close(mixed, plain)
    assert not torch.isclose(mixed, other)


def test_clear_errors():
    with pytest.raises(ValueError, match="'dkd' needs one class for each image.*losses.dkd.dominant_label"):
        build(losses={"dkd": {}}, mixup=0.8)
    with pytest.raises(ValueError, match="'mlkd' takes two views"):
        build(losses={"mlkd": {}}, cutmix=1.0)
    with pytest.raises(ValueError, match="dataloader_drop_last: true and an even per_device_train_batch_size .it is 7"):
        config(mixup=0.8, dataloader_drop_last=True, per_device_train_batch_size=7)
    with pytest.raises(ValueError, match="every batch must be even"):
        config(mixup=0.8)
    with pytest.raises(ValueError, match="must not be negative"):
        config(mixup=-1.0)
