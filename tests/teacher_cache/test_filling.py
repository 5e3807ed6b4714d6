"""A cache that fills itself: the student is the same to the bit taught live, while it fills, and from it."""

import errno
import json
import os
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from helpers import DIGITS_RECIPE, Plain, config, images, train_logs
from interrupting import flip_a_bit, in_two_processes
from torch import nn
from torch.utils.data import Subset
from transformers import TrainerCallback

import hfkd.teacher_cache.batches
from hfkd import DistillationTrainer, Teacher, load_student
from hfkd.cli import main
from hfkd.commands.train import distill
from hfkd.losses import PKTLoss
from hfkd.training.teacher_report import TeacherReport

KD = {"kd": {"temperature": 2.0}}
IMAGES = 2 * 24  # of two epochs
LAYERS = {"student_layers": ["conv"], "teacher_layers": ["conv"]}


class Counting(Plain):
    """A teacher that counts the images that it is shown."""

    seen = 0

    def forward(self, pixel_values):
        Counting.seen += len(pixel_values)
        return super().forward(pixel_values)


class PooledStudent(Plain):
    """The same network, with a module that averages its map."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, pixel_values):
        return self.fc(self.pool(self.conv(pixel_values).relu()).flatten(1))


class Pooled(PooledStudent):
    def forward(self, pixel_values):
        Counting.seen += len(pixel_values)
        return super().forward(pixel_values)


class Tokens(Counting):
    """A teacher whose embedding is part of a larger tensor."""

    def forward(self, pixel_values):
        return self.fc(self.features(pixel_values)[:, 0])

    def features(self, pixel_values):
        Counting.seen += len(pixel_values)
        return self.conv(pixel_values).relu().flatten(2).transpose(1, 2).contiguous()


class Backbone(Tokens):
    """The same, without a classifier."""

    def forward(self, pixel_values):
        return self.features(pixel_values)


def teacher_of(kind=Counting, seed=1):
    torch.manual_seed(seed)
    model = kind()
    model.fc.weight.data *= 20
    return Teacher(model, has_classifier=kind is not Backbone)


def trained(
    teacher=None, limit=8.0, resume=None, callback=None, train_set=None, output_dir="run", student=Plain, **changes
):
    """Train for two epochs of three batches; `seen` is the number of images that the teacher sees meanwhile."""
    settings = {"losses": KD, "num_train_epochs": 2, "seed": 3} | changes
    torch.manual_seed(settings["seed"])
    trainer = DistillationTrainer(
        student(),
        teacher or teacher_of(),
        config(output_dir, **settings),
        train_dataset=train_set or images(24),
        eval_dataset=images(10, augment=False),
        teacher_cache_limit=limit,
    )
    trainer.pop_callback(TeacherReport)
    if callback is not None:
        trainer.add_callback(callback)
    Counting.seen = 0
    trainer.train(resume_from_checkpoint=resume)
    trainer.seen = Counting.seen
    return trainer


def assert_same(one, other):
    for name, value in one.distiller.state_dict().items():
        assert torch.equal(value, other.distiller.state_dict()[name]), name
    logs = [[{key: log[key] for key in log if "loss" in key} for log in train_logs(each)] for each in (one, other)]
    assert logs[0] == logs[1]


def files(pattern="*.safetensors"):
    return sorted(Path(datasets.config.HF_DATASETS_CACHE).rglob(f"hfkd_teacher_outputs/*/epoch-*/{pattern}"))


class At(TrainerCallback):
    """Does something after one step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def interrupt():
    raise KeyboardInterrupt


# ---- The same to the bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True, "logit_standardization": True},
        {"losses": {"mlkd": {}}, "bf16": True},
        {"losses": {"pkt": {}, "kd": {}}},
        {"losses": {"crd": {"negatives": 4}}, "bf16": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
    ids=["logits", "bf16", "two views", "embedding", "crd", "workers"],
)
def test_live_while_it_fills_and_from_it(changes):
    live, fills, reads = (trained(limit=limit, **changes) for limit in (0.0, 8.0, 8.0))
    assert_same(live, fills)
    assert_same(live, reads)
    assert live.seen == fills.seen >= IMAGES and reads.seen == 0
    assert len(files()) == 2 and not files("*.partial")


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": {"kd": {"regions": [1, 2, 4]}}},
        {"losses": {"dkd": {"regions": [1, 2], "warmup_epochs": 0}}, "logit_standardization": True, "bf16": True},
        {"losses": {"cat_kd": {}, "kd": {}}, "bf16": True, "channels_last": True},
        {"losses": {"srrl": {}}},
    ],
    ids=["regions", "regions on Z-scores", "CAT-KD", "the classifier"],
)
def test_averaged_map_and_classifier(changes):
    runs = [trained(teacher_of(Pooled), limit, student=PooledStudent, **changes) for limit in (0.0, 8.0, 8.0)]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    assert runs[0].seen == runs[1].seen >= IMAGES and runs[2].seen == 0


def test_half_the_bytes_where_the_precision_has_them():
    sizes = []
    for bf16 in (False, True):
        trained(bf16=bf16)
        sizes.append(sum(path.stat().st_size for path in files()) - sum(sizes))
    assert sizes[0] - sizes[1] == IMAGES * 10 * 2


@pytest.mark.parametrize("kind", [Tokens, Backbone])
def test_features_of_tokens(kind):
    """A sum over features that are part of a larger tensor is rounded as over the teacher's own."""
    strides = []

    class Watch(PKTLoss):
        def forward(self, student, teacher, batch):
            strides.append(teacher.embedding.stride())
            return super().forward(student, teacher, batch)

    runs = [trained(teacher_of(kind), limit, losses={"mine": Watch()}) for limit in (0.0, 8.0, 8.0)]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    assert runs[2].seen == 0 and len(set(strides)) == 1 and (strides[0][0] > 8) == (kind is Tokens)


def test_an_ensemble():
    runs = [
        trained([teacher_of(seed=1), teacher_of(seed=2)], limit, logit_standardization=True)
        for limit in (0.0, 8.0, 8.0)
    ]
    assert_same(runs[0], runs[2])
    assert [run.seen for run in runs] == [2 * IMAGES, 2 * IMAGES, 0]


def test_seeds_that_share_the_data_seed():
    """And methods of one pair, and shorter runs; another data_seed shows other images."""
    trained(seed=1, data_seed=5)
    other = trained(seed=2, data_seed=5)
    assert other.seen == 0
    assert_same(other, trained(limit=0.0, seed=2, data_seed=5))
    assert trained(seed=3, data_seed=5, losses={"dkd": {"warmup_epochs": 0}}, max_steps=4).seen == 0
    assert trained(seed=3, data_seed=5, num_train_epochs=3).seen == 24, "the third epoch"
    assert trained(seed=2, data_seed=6).seen == IMAGES


def test_other_batches_are_computed():
    """The last digits of an image's logits depend on the batch around it."""
    trained()
    for changes in ({"per_device_train_batch_size": 6}, {"train_set": Subset(images(24), range(16))}):
        live, fills = (trained(limit=limit, **changes) for limit in (0.0, 8.0))
        assert_same(live, fills)
        assert fills.seen == live.seen > 0


def test_another_teacher_has_its_own():
    """Its weights tell, also beside those that are rounded already; so do its answers, and the images."""
    trained(bf16=True)
    assert trained(teacher_of(seed=2), bf16=True).seen == IMAGES
    shared = teacher_of()
    assert [trained(shared, bf16=True).seen for _ in range(2)] == [0, 0]
    changed = teacher_of()
    changed.model.forward = lambda pixel_values: Counting.forward(changed.model, pixel_values).roll(1, dims=1)
    assert trained(changed, bf16=True).seen == IMAGES
    brighter = images(24)
    brighter.images[1] += 1  # which is not among the images of the identity's sample, were there more of them
    assert trained(train_set=brighter, bf16=True).seen == IMAGES


# ---- Runs that end early, beside others, on a full disk ------------------------------------------------------------


def test_an_interrupted_run_leaves_what_it_has():
    """Also in the middle of an epoch, where it is resumed; the next one computes nothing."""
    settings = {"save_strategy": "steps", "save_steps": 4}
    live = trained(limit=0.0, output_dir="live", **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(callback=At(5, interrupt), **settings)
    resumed = trained(resume=True, **settings)
    assert resumed.seen == 8, "the last batch: the one after the checkpoint is kept"
    reads = trained(output_dir="reads", **settings)
    assert reads.seen == 0
    assert_same(live, reads)
    for name, value in live.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_files_of_a_long_epoch(monkeypatch):
    monkeypatch.setattr("hfkd.teacher_cache.filling.FILE_BYTES", 16 * 10 * 4)
    trained()
    assert len(files()) == 4 and trained().seen == 0


def test_two_runs_at_the_same_time():
    """One that begins and ends while another is in its first epoch: both keep the same, once."""
    inner = []
    outer = trained(callback=At(1, lambda: inner.append(trained(output_dir="inner"))))
    assert_same(outer, inner[0])
    assert len(files()) == 2 and trained().seen == 0


def test_two_processes():
    def run(rank):
        fills, reads = trained(per_device_train_batch_size=4), trained(per_device_train_batch_size=4)
        assert_same(fills, reads)
        assert reads.seen == 0 and fills.seen > 0

    assert in_two_processes(run) == [0, 0]
    assert len(files()) == 4


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: os.truncate(path, 100), Path.touch, Path.unlink])
def test_a_damaged_file(damage, caplog):
    fills = trained()
    path = files()[0]
    before = path.read_bytes()
    damage(path)
    again = trained()
    assert_same(fills, again)
    whole = damage is Path.touch
    assert again.seen == (0 if whole else 24)
    assert (f"{path} is damaged" in caplog.text) == (damage not in (Path.touch, Path.unlink))
    assert trained().seen == 0 and before in [path.read_bytes() for path in files()]


def test_a_full_disk(monkeypatch, caplog):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hfkd.teacher_cache.batches, "writing", full)
    assert_same(trained(limit=0.0), trained())
    told = [record.message for record in caplog.records if "not kept" in record.message]
    assert told == [
        "The teacher's further outputs are not kept: No space left on device. The training goes on without."
    ]
    assert not files("*")


def test_a_disk_that_would_be_full(monkeypatch, caplog):
    monkeypatch.setattr(hfkd.teacher_cache.batches, "SPARE", 2**60)
    trained()
    assert "GiB would be left on the disk" in caplog.text and not files()


def test_the_limit(caplog):
    """It is never passed; what is kept is read; what no run has read for a day makes room."""
    trained()
    sizes = [path.stat().st_size for path in files()]
    root = files()[0].parents[2]
    about = next(root.glob("*/about.json"))
    limit = (sum(sizes) + about.stat().st_size + sizes[0] + about.stat().st_size / 2) / 2**30
    other = trained(teacher_of(seed=2), limit)
    assert f"have reached the {limit:.3g} GiB of teacher_cache_limit" in caplog.text
    assert trained(teacher_of(seed=2), limit).seen == 24 and len(files()) == 3
    os.utime(about, (time.time() - 2 * 24 * 3600,) * 2)
    assert_same(other, trained(teacher_of(seed=2), limit))
    assert not about.exists() and len(files()) == 2 and trained(teacher_of(seed=2), limit).seen == 0


# ---- Where it cannot be used, and what is told ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"losses": {"fitnet": LAYERS}}, "FitNetLoss reads more of it than logits, embedding and averaged map"),
        ({"mixup": 0.5, "dataloader_drop_last": True}, "mixup and cutmix mix images in each batch anew"),
        ({"train_set": [(torch.ones(3, 32, 32), 0)] * 8}, "the training images have no rows of one data set"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches joins the batches"),
    ],
)
def test_where_it_cannot_be_used_it_says_so_once(changes, reason, capsys):
    trainer = trained(**changes, max_steps=1)
    trainer.train()
    told = capsys.readouterr().out
    assert told.count("cache     none, the teacher runs: ") == 1 and reason in told
    assert not files() and trainer.seen > 0


RECIPE = DIGITS_RECIPE | {
    "teacher_name_or_path": "teacher",
    "losses": KD,
    "train_split": "train[:64]",
    "num_train_epochs": 2,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "disable_tqdm": True,
}


def test_on_the_command_line(capsys, monkeypatch):
    """The run of a recipe is the same run with the key, and is resumed without it."""
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)
    torch.manual_seed(1)
    load_student("cifar_resnet8", num_classes=10).save_pretrained("teacher")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    runs = {}
    for name, words in {"live": [], "fills": ["--teacher_cache", "auto"], "reads": ["--teacher_cache=auto"]}.items():
        runs[name] = distill(["recipe.yaml", "--output_dir", name, *words])
    assert_same(runs["live"], runs["fills"])
    assert_same(runs["live"], runs["reads"])
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if line.startswith("cache "))
    assert line.startswith("cache     0.0024 MiB of the teacher's outputs an epoch, read from or written to ")
    assert line.endswith("; those of all teachers take at most 8 GiB (teacher_cache_limit)")
    assert told.count(line) == 2
    results = [json.loads(Path(name, "results.json").read_text()) for name in ("live", "reads")]
    assert results[0]["best"] == results[1]["best"] and results[0].keys() == results[1].keys()
    distill(["recipe.yaml", "--output_dir", "reads", "--resume_from_checkpoint", "true"])
    before = files()
    distill(["recipe.yaml", "--output_dir", "off", "--teacher_cache", "auto", "--teacher_cache_limit", "0"])
    assert files() == before and "cache  " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--teacher_name_or_path", "null", "--losses", "{}"],
            "teacher_cache: auto keeps what a teacher says, and none",
        ),
        (["--teacher_cache_limit", "-1"], "teacher_cache_limit must not be negative"),
    ],
)
def test_mistakes(words, message, capsys):
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(SystemExit) as end:
        main(["distill", "recipe.yaml", "--teacher_cache", "auto", *words])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("limits", [(8.0, 8.0), (0.0, 8.0), (8.0, 0.0)])
def test_trainers_that_share_images_do_not_share_outputs(limits):
    """Both are built before the first one trains; each is taught by its own teacher."""
    alone = [trained(teacher_of(seed=seed), limit=0, output_dir=f"alone{seed}") for seed in (1, 2)]
    shared, trainers = images(24), []
    for seed, limit in zip((1, 2), limits, strict=True):
        trained(teacher_of(seed=seed), limit=limit, output_dir=f"before{seed}")  # where a cache is kept, it is full
        torch.manual_seed(3)
        arguments = config(f"shared{seed}", losses=KD, num_train_epochs=2, seed=3)
        sets = {"train_dataset": shared, "eval_dataset": images(10, augment=False)}
        trainers.append(
            DistillationTrainer(Plain(), teacher_of(seed=seed), arguments, teacher_cache_limit=limit, **sets)
        )
    for trainer, expected in zip(trainers, alone, strict=True):
        trainer.train()
        assert_same(trainer, expected)
