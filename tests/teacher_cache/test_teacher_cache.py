"""Students that learn from a teacher's stored logits: as from the teacher itself, and from no other's."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Plain, config, images, train_logs
from interrupting import in_two_processes
from PIL import Image
from torch.utils.data import DataLoader, Subset

from hfkd import CachedTeacher, DistillationTrainer, Teacher
from hfkd.data import (
    CenterCrop,
    LazyImageDataset,
    RandomResizedCrop,
    StreamingImageDataset,
    collate_batch,
    load_image_splits,
    open_streams,
)
from hfkd.data.augment import crop_flip
from hfkd.losses import KDLoss, standardize
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD
from hfkd.networks.teacher import TeacherEnsemble
from hfkd.teacher_cache.files import CacheFiles, read_facts, write_rows
from hfkd.teacher_cache.rows import RowFormat
from hfkd.teacher_cache.writing import write_cache

KD = {"kd": {"temperature": 2.0}}


class Rounding(Plain):
    """A teacher whose logits are rounded to float16."""

    def forward(self, pixel_values):
        return super().forward(pixel_values).float().half().float()


def plain(seed=1, kind=Plain):
    """Logits that differ, as a trained network's."""
    torch.manual_seed(seed)
    model = kind()
    model.fc.weight.data *= 20
    return model


def evaluation_images(seed=1):
    return images(10, seed=seed, augment=False)


def cached(folder="cache", teacher=None, train_set=None, epochs=2, views=1, top_k=None, temperatures=(2.0,), **changes):
    """A cache of three shards an epoch, opened."""
    row = RowFormat(10, views, top_k, temperatures if top_k else ())
    teacher = Teacher(plain()) if teacher is None else teacher
    train_set = train_set or images(24)
    write_cache(folder, teacher, train_set, evaluation_images(), config(**changes), row, epochs=epochs, rows_a_shard=9)
    return CachedTeacher(folder)


def trained(teacher, losses=KD, train_set=None, epochs=2, output_dir="run", resume=None, **changes):
    torch.manual_seed(3)
    args = config(output_dir, losses=losses, num_train_epochs=epochs, **changes)
    train_set = train_set or images(24)
    trainer = DistillationTrainer(Plain(), teacher, args, train_dataset=train_set, eval_dataset=evaluation_images())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_training(one, other):
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    for expected, given in zip(train_logs(one), train_logs(other), strict=True):
        keys = [key for key in expected if key.startswith("loss")]
        assert {key: given[key] for key in keys} == {key: expected[key] for key in keys}


def batch_of(dataset, epoch):
    dataset.set_epoch(epoch)
    return dataset.__getitems__(range(len(dataset)))


# ---- As from the teacher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [KD, {"mlkd": {}}, {"ctkd": {"instance_wise": True}}], ids=["kd", "mlkd", "ctkd"])
@pytest.mark.parametrize("zscore", [False, True])
def test_training_is_that_with_the_rounded_teacher(losses, zscore):
    """Exactly, for every method that reads logits: all of them are stored.

    The teachers compute in float64. A cache is written in batches of other sizes, and what float32 rounds differently
    there can come to the other neighbour in float16.
    """
    cache = cached(teacher=Teacher(plain().double()), views=2)
    changes = {"losses": losses, "logit_standardization": zscore}
    live, replayed = trained(plain(kind=Rounding).double(), **changes), trained(cache, **changes)
    assert_same_training(live, replayed)
    exact = trained(plain(), **changes)
    assert train_logs(exact)[-1]["loss"] == pytest.approx(train_logs(replayed)[-1]["loss"], rel=1e-3)
    live, replayed = live.evaluate(), replayed.evaluate()
    assert {key for key in live if key.endswith(("agreement", "teacher_top1"))} == {
        "eval_agreement",
        "eval_teacher_top1",
    }
    assert all(replayed[key] == live[key] for key in ("eval_agreement", "eval_teacher_top1", "eval_top1"))


@pytest.mark.parametrize("zscore", [False, True])
def test_all_classes_as_the_largest(zscore):
    changes = {"logit_standardization": zscore}
    replayed = trained(cached(top_k=10), **changes)
    live = trained(plain(), **changes)
    for expected, given in zip(train_logs(live), train_logs(replayed), strict=True):
        assert given["loss_kd"] == pytest.approx(expected["loss_kd"], rel=2e-3)


def test_the_student_sees_the_largest_logits_as_they_are():
    """And not standardized anew."""
    seen = []

    class Watch(KDLoss):
        def forward(self, student, teacher, batch):
            seen.append((self.logits(student, teacher)[1], batch["pixel_values"]))
            return super().forward(student, teacher, batch)

    cache = cached(top_k=3, temperatures=(2.0, 4.0))
    for temperature in (2.0, 4.0):
        trained(cache, {"mine": Watch(temperature=temperature)}, logit_standardization=True, max_steps=1)
        logits, pixels = seen.pop()
        exact = standardize(plain()(pixels)).detach()
        largest = exact.topk(3).indices
        torch.testing.assert_close(logits.gather(1, largest), exact.gather(1, largest), rtol=2**-10, atol=1e-5)
        shares, true_shares = ((values / temperature).softmax(1).gather(1, largest) for values in (logits, exact))
        torch.testing.assert_close(shares, true_shares, rtol=2e-3, atol=0)


def test_epochs_are_replayed_in_another_order():
    """Epoch 2 has the images of epoch 0, and 3 those of 1, with the logits of just these images."""
    orders, model = [], plain()

    class Watch(KDLoss):
        def forward(self, student, teacher, batch):
            torch.testing.assert_close(teacher.logits, model(batch["pixel_values"]), rtol=1e-3, atol=1e-3)
            orders.append(batch["index"].tolist())
            return super().forward(student, teacher, batch)

    trainer = trained(cached(), {"mine": Watch()}, epochs=4, per_device_train_batch_size=24)
    assert len(orders) == 4 and len({tuple(order) for order in orders}) == 4
    pixels = [batch_of(trainer.train_dataset, epoch)["pixel_values"] for epoch in range(4)]
    assert torch.equal(pixels[0], pixels[2]) and torch.equal(pixels[1], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])


def test_resumed_in_the_middle_of_an_epoch():
    cache, settings = cached(), {"epochs": 3, "save_strategy": "steps", "save_steps": 4}
    whole = trained(cache, output_dir="whole", **settings)
    resumed = trained(CachedTeacher("cache"), output_dir="resumed", resume="whole/checkpoint-4", **settings)
    assert_same_training(whole, resumed)


def test_a_live_teacher_after_a_cache():
    """The data set shows the images of its own epochs again."""
    train_set = images(24)
    trained(cached(epochs=1), train_set=train_set, max_steps=1)
    assert_same_training(trained(plain(), train_set=train_set), trained(plain()))


@pytest.fixture
def photos():
    generator = np.random.default_rng(0)
    for number in range(20):
        folder = Path("photos", "train" if number < 14 else "test", f"class {number % 2}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")


def lazy_images(skip=False):
    spec = {"image_size": 16, "mean": CIFAR_MEAN, "std": CIFAR_STD}
    train, test = load_image_splits("photos")
    augment = RandomResizedCrop(**spec, auto_augment="rand-m9-mstd0.5-inc1")
    return (
        LazyImageDataset(train, transform=augment, seed=5, skip_bad_images=skip),
        LazyImageDataset(test, transform=CenterCrop(**spec), skip_bad_images=skip),
    )


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.filterwarnings("ignore:photos")
def test_images_that_workers_decode(photos, bad):
    """Their logits come with them; those of an image that stands in for one that has become bad are its own."""
    model = Plain(classes=2)
    train_set, eval_set = lazy_images(skip=bad)
    args = config(dataloader_num_workers=2)
    write_cache("cache", Teacher(model), train_set, eval_set, args, RowFormat(2, 2), epochs=2, rows_a_shard=5)
    if bad:
        Path("photos/train/class 0/04.png").write_bytes(b"no image")
    train_set, _ = lazy_images(skip=bad)
    train_set.views, train_set.cache = 2, CachedTeacher("cache").files
    train_set.set_epoch(3)
    seen = []
    for batch in DataLoader(train_set, 4, shuffle=True, num_workers=2, collate_fn=collate_batch):
        logits = torch.stack([model(batch[view]) for view in ("pixel_values", "pixel_values_strong")], dim=1)
        torch.testing.assert_close(batch["teacher_logits"].float(), logits.detach(), rtol=1e-3, atol=1e-3)
        seen += batch["index"].tolist()
    assert len(seen) == 14 and len(set(seen)) == 14 - bad


def test_an_ensemble():
    members = [Teacher(plain(seed)) for seed in (1, 2)]
    cache = cached(teacher=TeacherEnsemble(members, standardized=True))
    assert cache.name == "Plain + Plain" and cache.parameter_count() == 2 * sum(p.numel() for p in Plain().parameters())
    changes = {"logit_standardization": True}
    live, replayed = trained([plain(1), plain(2)], **changes), trained(cache, **changes)
    assert train_logs(replayed)[-1]["loss_kd"] == pytest.approx(train_logs(live)[-1]["loss_kd"], rel=1e-3)
    with pytest.raises(ValueError, match="logit_standardization: True in the cache, False here"):
        trained(cache)


def test_a_subset_of_the_cached_images():
    cache, losses = cached(), {"kd": {}}
    part = Subset(images(24), [3, 17, 5, 20])
    assert_same_training(
        trained(plain(kind=Rounding), losses, train_set=part, per_device_train_batch_size=2),
        trained(cache, losses, train_set=Subset(images(24), [3, 17, 5, 20]), per_device_train_batch_size=2),
    )


def test_two_processes_read_one_cache():
    """Written by one: rows have the same place for any number of processes."""
    cache = cached()

    def run(rank):
        trainer = trained(CachedTeacher("cache"), per_device_train_batch_size=4)
        metrics = trainer.evaluate()
        if rank == 0:
            torch.save((trainer.model.state_dict(), metrics["eval_agreement"]), "two.pt")

    assert in_two_processes(run) == [0, 0]
    state, agreement = torch.load("two.pt")
    alone = trained(cache)
    torch.testing.assert_close(state, dict(alone.model.state_dict()), rtol=1e-4, atol=1e-6)
    assert agreement == alone.evaluate()["eval_agreement"]


def test_what_results_say():
    trainer = trained(cached(top_k=3), max_steps=1)
    facts = trainer.results.facts
    assert facts["teacher_cache"] == {"epochs": 2, "top_k": 3}
    assert facts["teacher"] == "Plain" and facts["teacher_parameters"] == sum(p.numel() for p in Plain().parameters())


def test_other_images_are_evaluated_without_the_teacher(photos):
    trainer = trained(cached(), max_steps=1)
    assert "eval_agreement" in trainer.evaluate()
    metrics = trainer.evaluate(evaluation_images(seed=2))
    assert "eval_top1" in metrics and "eval_agreement" not in metrics
    assert "eval_agreement" not in trainer.evaluate(images(10))  # augmented
    crop = CenterCrop(16, CIFAR_MEAN, CIFAR_STD)
    assert "eval_agreement" not in trainer.evaluate(StreamingImageDataset(open_streams("photos")[1], transform=crop))


# ---- Of no other use -----------------------------------------------------------------------------------------------


def recut(**changes):
    """The training images with another attribute."""
    dataset = images(24)
    vars(dataset).update(changes)
    return dataset


def relabelled():
    dataset = images(24)
    dataset.labels = dataset.labels.flip(0)
    return dataset


def test_other_images_are_refused():
    cache = cached()
    others = {
        "rows: 24 in the cache, 16 here": images(16),
        "seed: 0 in the cache, 7 here": recut(seed=7),
        "labels: .* in the cache": relabelled(),
        "images: .* in the cache": recut(images=images(24, seed=2).images),
        r"mean: \[0.5071.* in the cache, \[0.5, 0.5, 0.5\] here": recut(mean=(0.5, 0.5, 0.5)),
        r"std: .* \[0.5, 0.5, 0.5\] here": recut(std=(0.5, 0.5, 0.5)),
        "class_names: .* here": recut(class_names=[f"other {number}" for number in range(10)]),
        "transform.name: WeakAugmentation in the cache, NoAugmentation here": images(24, augment=False),
        "image_size: 32 in the cache, 24 here": images(24, size=24),
    }
    unflipped = images(24)
    unflipped.transform = type(unflipped.transform)(flip=False)
    others["transform.flip: True in the cache, False here"] = unflipped
    for message, dataset in others.items():
        with pytest.raises(ValueError, match=f"(?s)written for another run.*{message}.*hfkd cache-teacher RECIPE"):
            trained(cache, train_set=dataset)


def test_augmentation_that_has_changed_is_refused(monkeypatch):
    """In another version, say, under the same settings."""
    cache = cached()
    monkeypatch.setattr(
        "hfkd.data.augment.crop_flip", lambda images, top, left, flip: crop_flip(images, top, left, 1 - flip)
    )
    with pytest.raises(ValueError, match="the same settings give other images here; it was written with hfkd"):
        trained(cache)
    with pytest.raises(ValueError, match="the same settings give other images now"):
        cached()


class Several(KDLoss):
    """Reads the teacher at temperatures of its own."""

    teacher_temperature = None


def test_other_losses_are_refused():
    full, largest = cached("full"), cached("largest", top_k=3, temperatures=(2.0, 4.0))
    kd4 = KDLoss(temperature=4.0)
    for losses, message in {
        "crd": ({"crd": {"negatives": 4}}, "holds no features, and the loss 'crd' reads them"),
        "at": ({"at": {}}, "'at' reads the teacher's features"),
        "simkd": ({"simkd": {}}, "'simkd' reads the teacher's features"),
        **{
            name: ({name: {}}, f"'{name}' reads the teacher's features or classifier")
            for name in ("reviewkd", "cat_kd", "mgd", "ca_mkd")
        },
        "regions": ({"kd": {"regions": [1, 2]}}, "'kd' reads the teacher's features or classifier"),
        "mlkd": ({"mlkd": {}}, "views: 1 in the cache, 2 here"),
    }.values():
        with pytest.raises(ValueError, match=message):
            trained(full, losses)
    trained(largest, KD | {"tf_kd": {}})  # which reads no teacher
    for losses, message in {
        "several": ({"mine": Several()}, "largest 3 logits, and the loss 'mine' needs all.*without --top_k"),
        "ctkd": ({"ctkd": {}}, "'ctkd' needs all"),
        "skd": ({"skd": {}}, "'skd' needs all"),
        "two": (KD | {"mine": kd4}, "one temperature only.*kd at 2, mine at 4"),
        "other": ({"kd": {"temperature": 3.0}}, "2, 4, and the loss 'kd' reads them at 3.*--temperatures 2 4 3"),
    }.values():
        with pytest.raises(ValueError, match=message):
            trained(largest, losses)
    with pytest.raises(ValueError, match="leave mixup and cutmix at 0"):
        trained(full, mixup=0.8, dataloader_drop_last=True)


def test_other_data_sets_and_students_are_refused():
    cache = cached()
    with pytest.raises(ValueError, match="training set of hfkd.data.*none is given"):
        DistillationTrainer(Plain(), cache, config(losses=KD), eval_dataset=evaluation_images())
    with pytest.raises(ValueError, match="student has 12: build the student with num_classes=10"):
        DistillationTrainer(Plain(classes=12), cache, config(losses=KD), train_dataset=images(24))


def test_a_stream_is_refused(photos):
    spec = {"image_size": 16, "mean": CIFAR_MEAN, "std": CIFAR_STD}
    stream = StreamingImageDataset(open_streams("photos")[0], transform=RandomResizedCrop(**spec))
    with pytest.raises(ValueError, match="this one is a StreamingImageDataset: set streaming: false"):
        DistillationTrainer(Plain(2), cached(), config(losses=KD), train_dataset=stream)


# ---- Damage --------------------------------------------------------------------------------------------------------


def content_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.bin")}


def flip_a_bit(path):
    content = bytearray(Path(path).read_bytes())
    content[-3] ^= 1
    Path(path).write_bytes(content)


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"0"), "bytes instead of"),
    "missing": (lambda path: path.unlink(), "1 of its 7 files are missing"),
    "corrupted": (flip_a_bit, "checksum differs"),
    "another file": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "header is not a cache's"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["epoch-0001/shard-00002.bin", "evaluation.bin"])
def test_a_damaged_file_is_found_and_replaced(damage, name):
    cached()
    before, (spoil, message) = content_of("cache"), DAMAGES[damage]
    spoil(Path("cache", name))
    with pytest.raises(ValueError, match=rf"(?s)cache/{name}.*{message}|{message}.*cache/{name}"):
        trained(CachedTeacher("cache")).evaluate()
    cached()
    assert content_of("cache") == before


def test_a_folder_without_a_cache():
    with pytest.raises(ValueError, match="nowhere holds no teacher cache.*hfkd cache-teacher"):
        CachedTeacher("nowhere")
    cached()
    Path("cache/cache.json").write_text("{")
    with pytest.raises(ValueError, match="cache.json cannot be read.*remove it"):
        CachedTeacher("cache")


def test_the_rows_are_not_loaded():
    """A copy of the files object, as a spawned DataLoader worker gets, carries no row along."""
    files = cached().files
    rows = np.arange(24)
    expected = files.read(1, rows)["teacher_logits"]
    moved = copy.deepcopy(files)
    assert not moved._open and torch.equal(moved.read(1, rows)["teacher_logits"], expected)
    assert all(not array.flags.owndata for array in files._open.values())


def memory_kib():
    """Of this process, without the pages of files, which the kernel takes back when it needs them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


def test_rows_stay_on_the_disk():
    """Of a cache of 64 MiB a process takes up what it reads."""
    row = RowFormat(1024, 1)
    shard = np.zeros(8192, row.dtype)
    facts = {"epochs": 4, "rows_a_shard": len(shard), "train": {"rows": len(shard)}, "row": row.facts()}
    files = CacheFiles("large", facts)
    for epoch in range(4):
        shard["teacher_logits"] = epoch
        write_rows(files.path(epoch, 0), shard)
    files.read(0, np.arange(4))
    before = memory_kib()
    for epoch in range(4):
        batch = files.read(epoch, np.arange(0, len(shard), 100))
        assert batch["teacher_logits"].unique().tolist() == [epoch]
    assert memory_kib() - before < 4 * 2**10


def test_few_shards_are_open_at_a_time(monkeypatch):
    monkeypatch.setattr("hfkd.teacher_cache.files.OPEN_SHARDS", 2)
    files = cached().files
    for epoch in (0, 1, 0):
        files.read(epoch, np.arange(24))
        assert len(files._open) <= 2


def test_another_cache_in_the_folder_is_refused():
    cached()
    for changes, message in (
        ({"epochs": 3}, "epochs: 2 in the cache, 3 here"),
        ({"top_k": 3}, "row.top_k: None in the cache, 3 here"),
        ({"views": 2}, "row.views: 1 in the cache, 2 here"),
        ({"teacher": Teacher(plain(5))}, "teacher.weights: .* here"),
        ({"train_set": recut(seed=7)}, "train.seed: 0 in the cache, 7 here"),
        ({"bf16": True}, "precision: torch.float32 in the cache, torch.bfloat16 here"),
    ):
        with pytest.raises(ValueError, match=f"(?s)cache holds another cache.*{message}.*--cache_dir"):
            cached(**changes)


def test_no_room(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 500, 500))
    with pytest.raises(RuntimeError, match="cache needs 0.00 GiB more.*set top_k"):
        cached()
    assert not content_of("cache")


def test_facts_are_plain():
    """And do not name this machine's folders, but for those that the recipe gives."""
    facts = cached().facts
    assert facts == json.loads(Path("cache/cache.json").read_text()) == read_facts("cache")
    assert CacheFiles("cache", facts).bytes_of(2) == 20 + 6 * 20
