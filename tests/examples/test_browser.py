"""examples/browser: the page's logits in a real browser, beside those of ONNX Runtime in Python."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from browser import CHROMIUM, Browser, served
from data.pictures import photo
from helpers import ROOT, probe_weight
from PIL import Image, ImageOps

from hfkd import load_student
from hfkd.commands.export import export
from hfkd.export.preprocessing import Preprocessing
from hfkd.export.quantization import StaticQuantizer
from hfkd.networks.wrapping import exported_state_dict

EXAMPLE = ROOT / "examples" / "browser"
LIBRARY = EXAMPLE / "node_modules" / "onnxruntime-web"
CLASSES = ["ant", "Große Katze", "bee, wild", "<b>cow</b>", "dog", "eel", "fox"]
SETTINGS = ("image_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
# Largest difference, as a share of the largest logit. Pixels are equal to the bit; sums have other orders. In int8 an
# activation may round to the next step.
TOLERANCE = {"float32": 1e-5, "int8": 0.02}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
    pytest.mark.skipif(not LIBRARY.is_dir(), reason="run `npm install` in examples/browser for onnxruntime-web"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page, a float32 and an int8 model in `float32/` and `int8/`, and three photographs."""
    site = tmp_path_factory.mktemp("site")
    for name in ("index.html", "classify.js", "node_modules"):
        (site / name).symlink_to(EXAMPLE / name)
    model = load_student("cifar_resnet8", CLASSES, crop_pct=0.8)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(probe_weight(key, value))
    model.save_pretrained(site / "student", state_dict=exported_state_dict(model), save_original_format=False)
    export([str(site / "student"), "--output_dir", str(site / "float32")])
    shutil.copytree(site / "float32", site / "int8")
    images, labels = (
        torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        torch.arange(32) % len(CLASSES),
    )
    quantizer = StaticQuantizer(site / "float32" / "model.onnx", images, images, labels)
    assert quantizer.quantize(site / "int8" / "model.onnx", max_drop=100).int8_layers == 10
    photo(60, 407).save(site / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees
    photo(301, 209).save(site / "turned.jpg", exif=turned)
    photo(20, 24).save(site / "small.png")
    return site


@pytest.fixture(scope="module")
def page(site, tmp_path_factory):
    with served(site) as address, Browser(tmp_path_factory.mktemp("user")) as browser:
        yield browser, address


def expected(site, precision, name):
    """Logits (7,) of a photograph, by Pillow and ONNX Runtime."""
    facts = json.loads((site / precision / "preprocessing.json").read_text())
    preparation = Preprocessing(**{key: facts[key] for key in SETTINGS})
    pixels = preparation(ImageOps.exif_transpose(Image.open(site / name)).convert("RGB")).numpy()
    session = onnxruntime.InferenceSession(site / precision / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": pixels[None]})[0][0]


def shown(browser):
    """The logits and the rows of the table, once the page is done."""
    browser.wait_for("['done', 'failed'].includes(document.body.dataset.state)")
    assert browser.value("document.body.dataset.state") == "done", browser.value("document.body.innerText")
    rows = browser.value("Array.from(document.querySelectorAll('tr'), row => Array.from(row.cells, c => c.innerText))")
    return np.array(json.loads(browser.value("document.getElementById('logits').textContent"))), rows


def check(site, browser, precision, name):
    logits, rows = shown(browser)
    wanted = expected(site, precision, name)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE[precision] * np.abs(wanted).max())
    best = np.argsort(-logits, kind="stable")[:5]  # int8 logits may be equal
    assert [row[0] for row in rows] == [CLASSES[index] for index in best]
    shares = 100 * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert [row[1] for row in rows] == [f"{shares[index]:.1f} %" for index in best]


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", ["wide.png", "small.png"])
def test_the_address_names_an_image(site, page, precision, name):
    browser, address = page
    browser.open(f"{address}/index.html?model={precision}/&image={name}")
    check(site, browser, precision, name)


def test_the_two_models_differ(site):
    assert not np.array_equal(expected(site, "float32", "wide.png"), expected(site, "int8", "wide.png"))


def test_an_image_is_chosen(site, page):
    browser, address = page
    browser.open(f"{address}/index.html?model=float32/")
    browser.choose_file("#file", site / "turned.jpg")
    check(site, browser, "float32", "turned.jpg")


@pytest.mark.parametrize("change", [{}, {"interpolation": "bilinear", "crop_mode": "squash"}, {"crop_pct": 0.7}])
def test_pixels_are_those_of_pillow_to_the_bit(site, page, change):
    browser, address = page
    facts = json.loads((site / "float32" / "preprocessing.json").read_text())
    settings = {key: facts[key] for key in SETTINGS} | change
    browser.open(f"{address}/index.html")
    blob = "await (await fetch('wide.png')).blob()"
    code = f"import('./classify.js').then(async m => Array.from(await m.prepare({blob}, {json.dumps(settings)})))"
    wanted = Preprocessing(**settings)(Image.open(site / "wide.png")).numpy()
    assert np.array_equal(np.float32(browser.value(code)), wanted.ravel())


def test_what_is_missing_is_told(page):
    browser, address = page
    browser.open(f"{address}/index.html")
    browser.wait_for("document.getElementById('status').innerText !== ''")
    assert browser.value("document.getElementById('status').innerText") == (
        "preprocessing.json cannot be read (404 File not found)."
    )
    browser.open(f"{address}/index.html?model=int8/&image=none.png")
    browser.wait_for("document.body.dataset.state === 'failed'")
    assert "none.png cannot be read (404" in browser.value("document.getElementById('status').innerText")
