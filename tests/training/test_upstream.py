"""What hfkd leans on in other libraries is checked by name: each missing one is told with library and versions."""

import importlib
import re

import pytest
import torch
import torch._dynamo
import transformers

from hfkd import DistillationTrainer
from hfkd.training import upstream
from hfkd.training.upstream import ATTRIBUTES, KNOWN_TO_WORK, OVERRIDDEN, USED, UpgradeError, check_upstream

TRAINERS_OWN = vars(transformers.Trainer)


def refused(library, problem):
    """The one message of a check that fails."""
    versions = re.escape(KNOWN_TO_WORK[library])
    return pytest.raises(
        UpgradeError,
        match=rf"hfkd does not fit {library} [\d.+a-z]+: {problem}.* Known to work: {library} {versions}\.",
    )


def test_the_installed_versions_fit():
    check_upstream()


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_a_method_that_is_gone(method, monkeypatch):
    if method == "__init__":
        monkeypatch.setattr(transformers.Trainer, method, lambda self, model: None)
        expected = r"Trainer.__init__ takes \(model\)"
    else:
        monkeypatch.delattr(transformers.Trainer, method)
        expected = f"transformers.Trainer.{method} is missing"
    with refused("transformers", expected):
        check_upstream()


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_a_method_with_another_parameter(method, monkeypatch):
    own = TRAINERS_OWN[method]
    own = own.__func__ if isinstance(own, staticmethod) else own

    def changed(self, *args, and_one_more=None, **kwargs):
        return own(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, method, changed)
    with refused("transformers", rf"Trainer.{method} takes \(.*and_one_more"):
        check_upstream()


@pytest.mark.parametrize("name", USED)
def test_a_name_that_is_gone(name, monkeypatch):
    holder, _, attribute = name.rpartition(".")
    holder = upstream._find(holder)
    if holder is torch._dynamo.config:  # it deletes in a way of its own
        monkeypatch.delitem(holder._config, attribute)
    else:
        owners = [owner for owner in getattr(holder, "__mro__", [holder]) if attribute in vars(owner)]
        monkeypatch.delattr(owners[0] if owners else holder, attribute)
    with refused(name.partition(".")[0], f"{name} is missing"):
        check_upstream()


@pytest.mark.parametrize(
    "name, attribute", [(name, each) for name, all_ in ATTRIBUTES.items() for each in all_.split()]
)
def test_an_attribute_that_is_gone(name, attribute, monkeypatch):
    names_in = upstream._names_in
    monkeypatch.setattr(upstream, "_names_in", lambda found: [each for each in names_in(found) if each != attribute])
    with refused(name.partition(".")[0], f"{name} no longer has {attribute}"):
        check_upstream()


def test_attributes_are_read_from_the_code():
    """The check sees what a class sets and reads, and nothing else."""

    class Example:
        def __init__(self):
            self.here = 1

    assert "here" in upstream._names_in(Example) and "gone" not in upstream._names_in(Example)


def test_every_override_is_listed():
    """A method of Trainer that the trainer overrides has an entry, so that its renaming is noticed."""
    overridden = {name for name in vars(DistillationTrainer) if callable(getattr(DistillationTrainer, name))}
    overridden = {name for name in overridden if name in TRAINERS_OWN} - {"__doc__", "__module__"}
    assert overridden == set(OVERRIDDEN)
    assert len([name for name in overridden if name.startswith("_") and name != "__init__"]) <= 10


def test_the_check_comes_with_the_trainer(monkeypatch):
    import hfkd.training

    monkeypatch.delattr(transformers.Trainer, "_save_checkpoint")
    with refused("transformers", "transformers.Trainer._save_checkpoint is missing"):
        importlib.reload(hfkd.training)
