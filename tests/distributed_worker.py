"""What each process of test_distributed.py runs: trains every method, rank 0 saves what came out."""

import torch
from helpers import Plain, config, images, train_logs
from torch import nn

from hfkd import DistillationTrainer, load_student
from hfkd.data import CenterCrop, MixedImageDataset, RandomResizedCrop, StreamingImageDataset, open_streams
from hfkd.losses import CRDLoss
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD


class DrawnByRow(CRDLoss):
    """Each image has the same negatives in every step, whichever process sees it."""

    def draw(self, index):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return super().draw(torch.arange(len(self.places)))[index]


MAPS = {"student_layers": ["conv", "deep"], "teacher_layers": ["conv", "deep"], "weight": 1.0}  # of `Deeper`

OFD = {  # of ResNets
    "student_layers": ["layer2.0.act2:input", "layer3.0.act2:input"],
    "teacher_layers": ["layer2.1.act2:input", "layer3.1.act2:input"],
    "teacher_norms": ["layer2.1.bn2", "layer3.1.bn2"],
}

MEANS = {  # losses that are means over the batch: splitting the batch over processes must not change them
    "kd": {"kd": {}},
    "dkd": {"dkd": {"warmup_epochs": 2}},
    "ctkd": {"ctkd": {"weight": 0.9}},
    "ctkd_instance": {"ctkd": {"instance_wise": True}},
    "locality_guidance": {"locality_guidance": MAPS},
    "fitnet": {"fitnet": MAPS},
    "at": {"at": MAPS | {"weight": 100.0}},
    "vid": {"vid": MAPS},
    "crd": {"crd": DrawnByRow(negatives=20, dimension=4)},
    "srrl": {"srrl": {}},
    "simkd": {"simkd": {}},
    "ttm": {"ttm": {}},
    "wttm": {"wttm": {}},
    "nkd": {"nkd": {}},
    "abkd": {"abkd": {"weight": 10.0}},
    "wsld": {"wsld": {}},
    "hard": {"hard": {}},
    "rld": {"rld": {"warmup_epochs": 2}},
    "tf_kd": {"tf_kd": {"multiplier": 10.0}},
    "crld": {"crld": {"weak_threshold": 0.3}},
    "nst": {"nst": MAPS},
    "token_mse": {"token_mse": MAPS},
    "vkd": {"vkd": MAPS},
    "feature_queue": {"feature_queue": {"size": 16}},
    "reviewkd": {"reviewkd": MAPS | {"warmup_epochs": 2}},
    "cat_kd": {"cat_kd": {}},
    "ofd": {"ofd": OFD | {"weight": 1e-5}},
    "ca_mkd": {"ca_mkd": {"features": 0.1}},
    "ofa": {"ofa": {"student_layers": ["conv", "deep"]}},
    "regions": {"kd": {"regions": [1, 2, 4]}},
    "mgd": {"mgd": MAPS | {"dropped": 0.5, "weight": 1e-3}},
    "mixed": {"kd": {}, "dkd": {"warmup_epochs": 0}},  # half of each process's images have no labels
    "unlabelled": {"kd": {}, "token_mse": MAPS},
}
# So that logit_standardization makes others of them.
READ_LOGITS = ("kd", "dkd", "ctkd", "ctkd_instance", "mlkd", "dist", "ttm", "wttm", "nkd", "abkd", "wsld", "hard")
READ_LOGITS += ("rld", "crld", "skd", "ofa")

COUPLED = {  # losses that compare the images of a batch with one another: each process compares its own
    "mlkd": {"mlkd": {}},
    "sp": {"sp": MAPS | {"weight": 100.0}},
    "pkt": {"pkt": {"weight": 100.0}},
    "semckd": {"semckd": MAPS | {"batch_size": 8}},
    "dist": {"dist": {}},
    "rkd": {"rkd": {}},
    "cc": {"cc": {"dimension": 4, "weight": 1.0}},
    "srd": {"srd": {}},
    "itrd": {"itrd": {}},
    "skd": {"skd": {}},
    "uskd": {"uskd": {"student_layer": "conv", "mu": 1.0}},
}

LEARNT = {  # losses with parts that learn, or that change the student: every one must get a gradient in every step
    "features": {"kd": {}, **{name: {} for name in ("fitnet", "vid", "semckd", "srrl", "at", "sp", "pkt")}},
    "new_features": {name: {} for name in ("rkd", "nst", "cc", "token_mse", "srd", "itrd", "vkd", "feature_queue")},
    "newer_features": {"reviewkd": {}, "cat_kd": {}, "ofd": OFD, "mgd": {}, "uskd": {}, "ofa": {}},
    "learnt_simkd": {"kd": {}, "simkd": {}},
}


class Deeper(Plain):
    """With maps of two layers."""

    def __init__(self, width):
        super().__init__(width=width)
        self.deep = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, pixel_values):
        return self.fc(self.deep(self.conv(pixel_values).relu()).relu().mean(dim=(2, 3)))


def networks_in_float64(name):
    """A student and a teacher for a run of `MEANS` or `COUPLED`."""
    torch.manual_seed(0)
    if name in ("simkd", "cat_kd", "ofd", "ca_mkd", "regions"):  # which need layers that `Deeper` has not
        student, teacher = resnets()
        return student, [teacher, load_student("cifar_resnet8x4", num_classes=10)] if name == "ca_mkd" else teacher
    student, teacher = Deeper(8), Deeper(12)
    if name == "batch_norm":
        student.deep = nn.Sequential(student.deep, nn.BatchNorm2d(8))
    teacher.fc.weight.data *= 20  # else all images look alike to it
    return student, teacher


def resnets():
    return load_student("cifar_resnet8", num_classes=10), load_student("cifar_resnet14", num_classes=10)


class Exact(DistillationTrainer):
    """In float64, since float32 rounds small KL terms in the third digit. Unless told otherwise BatchNorm, in students
    and projectors, uses its running statistics, so that a batch can be split."""

    normalizes_by_batch = False

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}

    def compute_loss(self, model, *args, **kwargs):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(self.normalizes_by_batch)
        return super().compute_loss(model, *args, **kwargs)


def trainer_of(kind, losses, world_size, student, teacher, output_dir, **changes):
    """With batches of eight images, over all processes and accumulated steps."""
    accumulated = changes.get("gradient_accumulation_steps", 1)
    probe_every = None if "data" in changes else 1  # which may have no labels
    data = {"train_dataset": images(32), "eval_dataset": images(26, seed=1, augment=False)} | changes.pop("data", {})
    batch_size = 8 // world_size // accumulated
    settings = {"per_device_train_batch_size": batch_size, "num_train_epochs": 2, "probe_every": probe_every}
    args = config(output_dir, **settings, **changes)
    return kind(student, teacher, args, losses=losses, **data)


def data_of(name, world_size):
    """Settings of a run without labels, or with some."""
    others = images(24, seed=2), images(32, seed=3, augment=False)
    for dataset in others:
        dataset.labels[:], dataset.has_labels = -100, False
    if name == "mixed":
        sizes = {"unlabelled_images": 4 // world_size, "batch_size": 8 // world_size}
        return {"data": {"train_dataset": MixedImageDataset(images(32), others[0], **sizes)}}
    without = {"train_dataset": others[0], "eval_dataset": others[1]}
    return {"data": without, "ce_weight": 0.0} if name == "unlabelled" else {}


def result_of(trainer):
    trainer.train()
    metrics = trainer.evaluate()
    result = {"state": trainer.distiller.state_dict(), "logs": train_logs(trainer), "metrics": metrics}
    return {"rank": trainer.args.process_index, **result}


def train(losses, world_size, student, teacher, output_dir, **changes):
    return result_of(trainer_of(DistillationTrainer, losses, world_size, student, teacher, output_dir, **changes))


def train_in_float64(name, losses, world_size, output_dir, **changes):
    torch.set_default_dtype(torch.float64)  # of projectors and memories
    try:
        changes |= data_of(name, world_size)
        trainer = trainer_of(Exact, losses, world_size, *networks_in_float64(name), output_dir, **changes)
        trainer.normalizes_by_batch = name == "batch_norm"
        return result_of(trainer)
    finally:
        torch.set_default_dtype(torch.float32)


class Recorder(DistillationTrainer):
    """Remembers the rows of each epoch, and how the model stood after each step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rows[int(self.state.epoch or 0)] += inputs["index"].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)


def stream(data, world_size, output_dir, resume_from_checkpoint=None):
    """Two epochs of a streamed data set, with DataLoader workers and a moving average."""
    torch.manual_seed(0)
    spec = {"image_size": 16, "mean": CIFAR_MEAN, "std": CIFAR_STD}
    splits = open_streams(data)
    train_set, eval_set = (
        StreamingImageDataset(split, transform=transform, seed=1, shuffle_buffer_size=6)
        for split, transform in zip(splits, (RandomResizedCrop(**spec), CenterCrop(**spec)), strict=True)
    )
    args = config(
        output_dir,
        losses={"kd": {}},
        per_device_train_batch_size=4,
        num_train_epochs=2,
        dataloader_num_workers=2,
        ema_decay=0.8,
        save_strategy="steps",
        save_steps=1,
    )
    trainer = Recorder(Plain(), Plain(), args, train_dataset=train_set, eval_dataset=eval_set)
    trainer.rows = {0: [], 1: []}
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    metrics = trainer.evaluate()
    return {"rank": args.process_index, "rows": trainer.rows, "state": trainer.model.state_dict(), "metrics": metrics}


def main(folder, world_size, data):
    results = {"stream": stream(data, world_size, f"{folder}/stream")}
    middle = f"{folder}/stream/checkpoint-{5 // world_size + 1}"
    results["resumed"] = stream(data, world_size, f"{folder}/resumed", resume_from_checkpoint=middle)
    for name, losses in (MEANS | COUPLED).items():
        for zscore in (False, True)[: 1 + (name in READ_LOGITS)]:
            key, settings = name + "_zscore" * zscore, {"logit_standardization": zscore}
            results[key] = train_in_float64(name, losses, world_size, f"{folder}/{key}", **settings)
            if name in COUPLED and world_size == 1:
                settings |= {"gradient_accumulation_steps": 2}
                results[f"{key}_accumulated"] = train_in_float64(name, losses, 1, f"{folder}/{key}", **settings)
    accumulated = {"gradient_accumulation_steps": 3 - world_size}
    results["batch_norm"] = train_in_float64("batch_norm", {"mlkd": {}}, world_size, f"{folder}/bn", **accumulated)
    torch.manual_seed(0)
    crd = {"crd": {"negatives": 20, "dimension": 4}}
    results["memories"] = train(crd, world_size, Plain(), Plain(), f"{folder}/memories")
    for name, losses in LEARNT.items():
        results[name] = train(losses, world_size, *resnets(), f"{folder}/{name}", save_strategy="epoch")
    student, teacher = resnets()
    with torch.no_grad():
        student.train()(torch.randn(8, 3, 32, 32))  # moves the statistics of the norms
    results["int8"] = train({"kd": {}}, world_size, student, teacher, f"{folder}/int8", quantize="int8")
    torch.save(results, f"{folder}/rank{results['kd']['rank']}.pt")
