"""Zero-shot teachers: CLIP and SigLIP classify by texts of the classes' names."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from hfkd import load_student, load_teacher
from hfkd.commands.cache_teacher import cache_teacher
from hfkd.commands.train import distill
from hfkd.errors import HfkdError
from hfkd.networks.features import EMBEDDING

NAMES = ["polar_bear", "ant", "bee"]
PROMPTS = ["a photo of a {}", "a blurry photo of a {} ."]
WORDS = ["<pad>", "<unk>", "a", "photo", "of", "blurry", ".", "polar", "bear", "ant", "bee", "</s>"]
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**WIDTHS, "vocab_size": len(WORDS), "max_position_embeddings": 12}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": len(WORDS) - 1}
VISION = {**WIDTHS, "image_size": 32, "patch_size": 8}
LIGHT = {"per_device_train_batch_size": 6, "num_train_epochs": 1, "load_best_model_at_end": "false"}
CPU = torch.device("cpu")


def save(folder, kind):
    """A model of random weights, which tell texts and images apart, with its tokenizer and image processor."""
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
        processor = CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32})
    else:
        model = SiglipModel(SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION))
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", len(WORDS) - 1)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero_shot")
    return {kind: save(folder / kind, kind) for kind in ("clip", "siglip")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for split, images in (("train", 4), ("test", 2)):
        for name in NAMES:
            for number in range(images):
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(path)
    return str(folder)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_are_those_of_the_model(models, kind):
    """Of one prompt those of its own forward; of several by the features' mean, by hand."""
    model = {"clip": CLIPModel, "siglip": SiglipModel}[kind].from_pretrained(models[kind]).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models[kind])
    pixels = torch.randn(3, 3, 32, 32)
    filled = {"padding": "max_length", "max_length": 12} if kind == "siglip" else {"padding": True}
    features = []
    for prompt in PROMPTS:
        texts = [prompt.replace("{}", name.replace("_", " ")) for name in NAMES]
        words = tokenizer(texts, return_tensors="pt", **filled)
        assert 1 not in words["input_ids"]  # every word is known
        mask = words["attention_mask"] if kind == "clip" else None
        with torch.no_grad():
            outputs = model(words["input_ids"], pixels, mask)
        teacher = load_teacher(models[kind], prompts=[prompt], class_names=NAMES)
        teacher.prepare(CPU, None, False, layers=[EMBEDDING])
        teacher.align_classes(NAMES, {"pixel_values": pixels})
        found = teacher({"pixel_values": pixels})
        torch.testing.assert_close(found.logits, outputs.logits_per_image)
        torch.testing.assert_close(torch.nn.functional.normalize(found.embedding), outputs.image_embeds)
        assert found.logits.std() > 1e-3 and (found.logits.argmax(dim=1) >= 0).all()
        features.append(outputs.text_embeds)
    mean = torch.nn.functional.normalize((features[0] + features[1]) / 2)
    logits = outputs.image_embeds @ mean.T * model.logit_scale.exp() + getattr(model, "logit_bias", 0)
    teacher = load_teacher(models[kind], prompts=PROMPTS, class_names=NAMES)
    torch.testing.assert_close(teacher({"pixel_values": pixels}).logits, logits.detach())
    text = sum(parameter.numel() for parameter in model.text_model.parameters())
    assert teacher.parameter_count() < sum(parameter.numel() for parameter in model.parameters()) - text
    assert teacher.input_spec.image_size == 32
    assert round(teacher.input_spec.mean[0], 2) == (0.48 if kind == "clip" else 0.5)
    # The classes of a student in another order.
    teacher.align_classes(["bee", "ant", "polar_bear"], {"pixel_values": pixels})
    torch.testing.assert_close(teacher({"pixel_values": pixels}).logits, logits.detach().flip(1))


def test_bf16_rounds_features_and_no_logits(models):
    pixels = {"pixel_values": torch.randn(64, 3, 32, 32)}
    whole, rounded = (load_teacher(models["clip"], prompts=PROMPTS, class_names=NAMES) for _ in range(2))
    rounded.prepare(CPU, torch.bfloat16, False)
    exact, logits = whole(pixels).logits, rounded(pixels).logits
    assert 0 < (exact - logits).abs().max() < 1
    assert not torch.equal(logits, logits.bfloat16().float())


def words(photos, teacher, *more):
    settings = [word for key, value in LIGHT.items() for word in (f"--{key}", str(value))]
    student = ["--student", "cifar_resnet8", "--dataset_name", photos, "--dataloader_num_workers", "0"]
    return [*student, "--teacher", teacher, "--teacher_prompts", *PROMPTS, "--losses.dkd.weight", "1", *settings, *more]


def test_a_student_learns_and_from_the_cache_too(models, photos, capsys):
    """With the Z-score and DKD; the run says what the teacher is, and the cache gives the same to float16."""
    common = ["--logit_standardization", "true", "--ce_weight", "0", "--random_flip", "false"]
    live = distill(words(photos, models["clip"], *common, "--output_dir", "live"))
    printed = capsys.readouterr().out
    assert "weights from the folder" in printed and "zero-shot, 2 templates" in printed
    row = live.results.rows[-1]
    assert row["loss_dkd"] > 0 and {"eval_teacher_top1", "eval_agreement"} <= row.keys()
    cache_teacher(words(photos, models["clip"], *common, "--cache_dir", "cache"))
    cached = distill(words(photos, models["clip"], *common, "--output_dir", "cached", "--teacher_cache", "cache"))
    assert cached.results.rows[-1]["loss_dkd"] == pytest.approx(row["loss_dkd"], rel=1e-3)
    assert cached.results.rows[-1]["eval_teacher_top1"] == row["eval_teacher_top1"]
    (member,) = json.load(open("cache/cache.json"))["teacher"]["members"]
    assert member["prompts"] == PROMPTS and member["class_names"] == sorted(NAMES)
    other = words(photos, models["clip"], *common, "--output_dir", "other", "--teacher_cache", "cache")
    other[other.index(PROMPTS[0])] = "a {}"
    with pytest.raises(HfkdError, match="written for another teacher:\n  teacher_prompts: .* in the cache, .* here"):
        distill(other)


@pytest.mark.parametrize(
    ("teacher", "prompts", "message"),
    [
        ("clip", ["a photo"], "teacher_prompts: 'a photo' has no {}, where the name of the class is put"),
        ("student", ["a {}"], "teacher_prompts are for CLIP or SigLIP .* has the type timm_wrapper, which reads no"),
        ("cifar_resnet20", ["a {}"], "cifar_resnet20 is a timm architecture, which reads no texts"),
    ],
)
def test_prompts_that_make_no_teacher(models, photos, teacher, prompts, message):
    load_student("cifar_resnet8", NAMES).save_pretrained("student")
    given = words(photos, models.get(teacher, teacher))
    position = given.index(PROMPTS[0])
    given[position : position + len(PROMPTS)] = prompts
    with pytest.raises(HfkdError, match=message):
        distill(given)


def test_classes_without_names(models):
    for names in (["0", "1"], ["LABEL_0", "LABEL_1"], ["n01440764", "n01443537"], []):
        with pytest.raises(HfkdError, match="give names that a text can hold"):
            load_teacher(models["clip"], prompts=PROMPTS, class_names=names)
