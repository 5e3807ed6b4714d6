"""Pushing with the real client to a stand-in for the Hub: what arrives, what is refused, what a dead network leaves."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from helpers import RESULTS, aligned
from hub_stand_in import TOKENS, writable_hub
from transformers import AutoModelForImageClassification

from hfkd import load_student
from hfkd.commands.push import find_export, push
from hfkd.hub import errors as hub_errors
from hfkd.hub import repository as hfkd_hub
from hfkd.hub.repository import PushError, ensure_repository, open_repository, upload
from hfkd.networks.wrapping import exported_state_dict

CLASSES = ["ant", "bee", "cow"]
CONFIG = {"architecture": "test_resnet", "model_type": "timm_wrapper", "label_names": CLASSES}
SECRET = "hf_wrong_and_secret"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    waits = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", waits)  # between the client's tries
    with writable_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


def export(folder, classes=CLASSES, seed=0):
    """A small export, as a trainer leaves it."""
    torch.manual_seed(seed)
    model = load_student("test_resnet", classes, image_size=32).eval()
    model.save_pretrained(folder, state_dict=exported_state_dict(model), save_original_format=False)
    Path(folder, "results.json").write_text(json.dumps(RESULTS | {"student": "test_resnet", "seed": seed}))
    Path(folder, "recipe.yaml").write_text("learning_rate: 0.1\n")
    Path(folder, "picture.png").write_bytes(bytes(range(256)))
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def refused(function, *args, **kwargs):
    """The error's text; no token stands in it, nor in those behind it."""
    with pytest.raises((ValueError, PushError)) as caught:
        function(*args, **kwargs)
    error = caught.value
    while error is not None:
        assert not any(token in str(error) for token in (SECRET, *TOKENS))
        error = error.__cause__ or error.__context__
    return str(caught.value)


# ---- What arrives --------------------------------------------------------------------------------------------------


def test_push_and_push_again(hub, capsys):
    export("run/student")
    for name in (".cache", "training_args.bin"):
        Path("run/student", name).write_text("hf_write")
    Path("run/student/folder").mkdir()
    commit = push(["run/student", "--hub_model_id", "x"])
    repository = hub.repositories["me/x"]
    there = repository.files()
    assert capsys.readouterr().out == f"Pushed run/student to {hub.url}/me/x\n"
    assert commit.oid == repository.branches["main"] and not repository.private
    expected = contents("run/student")
    del expected[".cache"], expected["training_args.bin"]
    assert {name: data for name, data in there.items() if name != ".gitattributes"} == expected
    assert b'model="me/x"' in there["README.md"]
    assert not any(b"hf_write" in data for data in there.values())
    picture, weights = sorted(hub.stored, key=lambda oid: len(hub.objects[oid]))

    export("run/student", seed=1)  # the same picture
    push(["run", "--hub_model_id", "me/x"])  # finds the export
    assert repository.files()["model.safetensors"] == Path("run/student/model.safetensors").read_bytes()
    assert len(hub.stored) == 3 and hub.stored.count(picture) == hub.stored.count(weights) == 1
    push(["run", "--hub_model_id", "me/x"])  # nothing is new
    assert len(hub.stored) == 3 and len(repository.commits) == 3


def test_an_organisations_private_branch(hub):
    export("teacher")
    arguments = ["teacher", "--hub_model_id", "lab/x", "--hub_private_repo", "true", "--hub_revision", "trial/1"]
    push(arguments)
    push(arguments)
    repository = hub.repositories["lab/x"]
    assert repository.private and list(repository.files()) == [".gitattributes"]
    assert repository.files("trial/1")["config.json"] == Path("teacher/config.json").read_bytes()
    assert ensure_repository("lab/x", CONFIG, private=True, token="hf_write") == "lab/x"
    assert "none that the token may see" in refused(upload, {"a": b""}, "lab/x", message="m", token="hf_someone")


def test_what_was_pushed_loads_back(hub):
    model = export("student", seed=3)
    push(["student", "--hub_model_id", "x"])
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels).logits
    loaded = AutoModelForImageClassification.from_pretrained("me/x").eval()
    assert torch.equal(aligned(loaded)(pixels).logits, expected)
    assert torch.equal(timm.create_model("hf-hub:me/x", pretrained=True).eval()(pixels), expected)
    assert hub.asked >= {"config.json", "model.safetensors"}


def test_uploads_in_the_background_keep_their_order(hub):
    hub.add("me/x")
    futures = [
        upload({"a.txt": f"{number}".encode(), f"{number}.txt": b"-"}, "me/x", message=f"{number}", background=True)
        for number in range(4)
    ]
    assert [future.result().oid for future in futures] == list(hub.repositories["me/x"].commits)[1:]
    assert hub.repositories["me/x"].messages[1:] == ["0", "1", "2", "3"]
    assert hub.repositories["me/x"].files()["a.txt"] == b"3"


def test_other_processes(hub, tmp_path):
    """Those that only get an environment."""
    hub.add("me/x", {"a.txt": b"all of it"}, private=True)
    code = "import huggingface_hub as h; print(h.whoami()['name'], open(h.hf_hub_download('me/x', 'a.txt')).read())"
    environment = hub.environment(tmp_path / "home", token="hf_read")
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout == "me all of it\n"


# ---- What is refused before training -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo_id, token, expected",
    [
        ("x", "", "There is no token for the Hub: log in with `hf auth login`, HF_TOKEN or hub_token"),
        ("x", SECRET, "does not accept the token: it is mistyped, expired or revoked.*`hf auth login`"),
        ("me/x", f"{SECRET}\n", "The token for the Hub holds a blank or another invalid character"),
        ("me/x", "hf_read", "token may not write to me/x .*the rights.*or a token that may write"),
        ("me/there", "hf_read", "token may not write to me/there .*write access.*or a token that may write"),
        ("someone/x", "hf_write", "token may not write to someone/x .*Give a hub_model_id of your own"),
        ("someone/there", "hf_write", "token may not write to someone/there .*Give a hub_model_id of your own"),
        ("someone/private", "hf_write", "token may not write to someone/private .*Give a hub_model_id of your own"),
        ("lab/x", "hf_someone", "token may not write to lab/x .*or of an organisation that you write for"),
        ("my model", "hf_write", "hub_model_id: 'my model' is no valid name of a repository, such as me/deit-tiny-kd"),
        (
            "me/models/x",
            "hf_write",
            "hub_model_id: 'me/models/x' is no valid name of a repos.*'namespace/repo_name'",
        ),
    ],
)
def test_who_may_write(hub, monkeypatch, repo_id, token, expected):
    monkeypatch.delenv("HF_TOKEN")
    for name, private in (("me/there", False), ("someone/there", False), ("someone/private", True)):
        hub.add(name, private=private)
    number = len(hub.repositories)
    message = refused(open_repository, repo_id, CONFIG, token=token)
    assert re.search(expected, message)
    assert message.endswith(
        "Training has not started. Leave push_to_hub out to train without the Hub; `hfkd push` uploads the result "
        "later."
    )
    with pytest.raises(PushError, match=expected):
        ensure_repository(repo_id, CONFIG, token=token)
    assert len(hub.repositories) == number


def test_no_hub(hub, monkeypatch):
    monkeypatch.setattr(hub_errors, "READ_TIMEOUT", 0.2)
    hub.silent = True
    assert "was not reached or did not answer (ReadTimeout: " in refused(open_repository, "x", CONFIG)
    assert "was not reached or did not answer (ReadTimeout: " in refused(upload, {"a": b""}, "me/x", message="m")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        message = refused(open_repository, "x", CONFIG)
    assert message.startswith(f"The Hub ({huggingface_hub.constants.ENDPOINT}) was not reached")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so the Hub is not contacted: unset it." in refused(open_repository, "x", CONFIG)


FINE = {
    "nothing but what comes with a repository": {"README.md": b"#", "LICENSE": b"", "license.txt": b""},
    "the same model": {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"-", "old.bin": b"-"},
}
OTHER = {
    "files": ({f"{name}.bin": b"-" for name in "gfedcba"}, "a.bin, b.bin, c.bin, d.bin, e.bin and 2 more. Give"),
    "another architecture": ({"config.json": {"model_type": "bert"}}, "its model is a bert, this one a test_resnet"),
    "more classes": ({"config.json": CONFIG | {"label_names": list("abcd")}}, "has 4 classes, this one 3"),
    "an order": (
        {"config.json": CONFIG | {"label_names": ["ant", "cow", "bee"]}},
        "class 1 of its test_resnet is 'cow",
    ),
    "no list": ({"config.json": ["a"]}, "its config.json is not an image classifier's"),
    "damaged": ({"config.json": b"{"}, "its config.json is not an image classifier's"),
}


@pytest.mark.parametrize("files", FINE.values(), ids=FINE)
def test_content_that_may_be_replaced(hub, files):
    hub.add("me/x", files)
    assert open_repository("me/x", CONFIG) == "me/x"
    assert open_repository("me/x", CONFIG, revision="new") == "me/x"
    assert hub.repositories["me/x"].files("new") == files


@pytest.mark.parametrize("files, expected", OTHER.values(), ids=OTHER)
def test_other_content(hub, files, expected):
    files = {name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in files.items()}
    hub.add("me/x", files)
    for revision in (None, "new"):
        message = refused(open_repository, "me/x", CONFIG, revision=revision)
        assert message.startswith("me/x holds something else: ") and expected in message
        assert f"Give another hub_model_id or hub_revision, or delete what is at {hub.url}/me/x if nobody" in message
    assert list(hub.repositories["me/x"].branches) == ["main"]
    hub.repositories["me/x"].commit("other", {"config.json": json.dumps(CONFIG).encode()})
    assert open_repository("me/x", CONFIG, revision="other") == "me/x"


def test_classes_of_transformers_own_models(hub):
    """In memory their names have numbers, in config.json texts, and what is default is left out there."""
    hub.add("me/x", {"config.json": b'{"model_type": "vit", "id2label": {"0": "a", "10": "c", "2": "b"}}'})
    assert open_repository("me/x", {"model_type": "vit", "id2label": {0: "a", 2: "b", 10: "c"}}) == "me/x"
    other = {"model_type": "vit", "id2label": {0: "a", 2: "b", 10: "d"}}
    assert "class 2 of its vit is 'c', of this one 'd'" in refused(open_repository, "me/x", other)
    assert "something else: config.json. Give" in refused(open_repository, "me/x", None)
    hub.add("me/two", {"config.json": b'{"model_type": "vit"}'})
    assert open_repository("me/two", {"model_type": "vit", "id2label": {0: "LABEL_0", 1: "LABEL_1"}}) == "me/two"


def test_a_public_repository_is_not_taken_for_a_private_one(hub):
    hub.add("me/x")
    message = refused(open_repository, "me/x", CONFIG, private=True)
    assert message.startswith("me/x exists and is public") and f"({hub.url}/me/x/settings)" in message


def test_a_gated_repository(hub):
    hub.add("me/x", {"config.json": b"{}"}).gated = True
    assert f"me/x is gated: ask for access at {hub.url}/me/x" in refused(open_repository, "me/x", CONFIG)


# ---- A network that goes -------------------------------------------------------------------------------------------


def start_again(hub):
    """Nothing was ever pushed; returns how many requests there were."""
    number = len(hub.log)
    for state in (hub.log, hub.repositories, hub.objects, hub.stored):
        state.clear()
    Path("student/README.md").unlink()
    return number


@pytest.mark.parametrize("failure", ["gone_after_requests", "gone_after_bytes", "gone_with"])
def test_the_network_goes_half_way(hub, failure):
    """Whenever: nothing is lost, and another push completes the first one."""
    export("student")
    push(["student", "--hub_model_id", "x"])
    whole = contents("student")
    places = {
        "gone_after_requests": range(start_again(hub)),
        "gone_after_bytes": (0, 300, 10_000, 1_000_000),  # of the weights and the picture
        "gone_with": ("/commit/", "/storage/", "/create"),
    }
    for place in places[failure]:
        setattr(hub, failure, place)
        message = refused(push, ["student", "--hub_model_id", "x"])
        assert f"The Hub ({hub.url}) was not reached or did not answer" in message
        if Path("student/README.md").exists():  # the repository was opened
            assert message.endswith(
                "Nothing is lost: student holds the whole model. Complete the push with: hfkd push student "
                "--hub_model_id me/x"
            )
            assert contents("student") == whole
        stored = list(hub.stored)
        hub.back()
        push(["student", "--hub_model_id", "x"])
        assert hub.repositories["me/x"].files().items() >= whole.items()
        assert len(hub.stored) == len(set(hub.stored)) == 2 and hub.stored[: len(stored)] == stored
        start_again(hub)


def test_an_upload_in_the_background_fails(hub):
    export("student")
    hub.add("me/x")
    hub.gone = True
    files = hfkd_hub.export_files(Path("student"))
    future = upload(files, "me/x", message="m", revision="main", background=True)
    error = future.exception()
    assert isinstance(error, PushError)
    assert str(error).endswith("Complete the push with: hfkd push student --hub_model_id me/x --hub_revision main")
    hub.back()
    upload(files, "me/x", message="m", background=True).result()
    assert hub.repositories["me/x"].files()["config.json"] == Path("student/config.json").read_bytes()
    hub.gone = True
    future = upload({"last-checkpoint/state.json": b"{}"}, "me/x", message="m", background=True)
    assert str(future.exception()).endswith("Nothing is lost: the files are on disk.")


def test_what_the_hub_does_not_take(hub):
    hub.add("me/x")
    message = refused(upload, {"README.md": b"---\n- a list\n---\n"}, "me/x", message="m")
    assert "The request to the Hub failed (ValueError: Invalid metadata in README.md" in message
    assert "There is no repository me/y" in refused(upload, {"a": b""}, "me/y", message="m")
    assert "me/x has no revision 'gone'" in refused(upload, {"a": b""}, "me/x", message="m", revision="gone")


# ---- The command line ----------------------------------------------------------------------------------------------


def test_folders_that_are_no_export(hub):
    with pytest.raises(ValueError, match="There is no folder runs/nothing to push"):
        find_export(Path("runs/nothing"))
    export("checkpoint-5")
    Path("checkpoint-5/results.json").unlink()
    expected = "checkpoint-5 is no export: it has no results.json. Give .*checkpoint-5/student, or the run's own"
    with pytest.raises(ValueError, match=expected):
        push(["checkpoint-5", "--hub_model_id", "x"])
    Path("run").mkdir()
    with pytest.raises(ValueError, match="run is no export: it has no config.json, model.safetensors, results.json"):
        push(["run", "--hub_model_id", "x"])
    export("run/student")
    export("run/teacher")
    with pytest.raises(ValueError, match="several exports: push one of run/student, run/teacher"):
        push(["run", "--hub_model_id", "x"])
    Path("run/teacher/config.json").write_text("{")
    with pytest.raises(ValueError, match="run/teacher/config.json is damaged .*: export the model again"):
        push(["run/teacher", "--hub_model_id", "x"])
    assert not hub.log


def test_arguments(capsys):
    with pytest.raises(ValueError, match="The first argument must be the folder to push, got '--hub_token'"):
        push(["--hub_token=hf_write", "student"])
    with pytest.raises(ValueError, match="got ''. Usage: hfkd push FOLDER --hub_model_id me/name"):
        push([])
    with pytest.raises(ValueError, match="hub_model_id"):
        push(["student"])
    with pytest.raises(ValueError, match="Unknown key 'hub_branch'"):
        push(["student", "--hub_model_id", "x", "--hub_branch", "y"])
    with pytest.raises(SystemExit):
        push(["--help"])
    assert "--hub_private_repo" in capsys.readouterr().out
