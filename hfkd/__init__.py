"""hfkd: teach a small image classifier with a large one, inside the Hugging Face ecosystem.

Importing hfkd costs almost nothing: each public name is imported when it is first used (PEP 562), and hfkd's
architectures (`cifar_resnet20`, `t2t_vit_7`, ...) are registered as soon as timm is imported, before or after hfkd.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors, which do not run __getattr__
    from .networks.inheritance import inherit_blocks
    from .networks.input_spec import input_spec
    from .networks.student_loading import load_student
    from .networks.teacher import Teacher
    from .networks.teacher_loading import load_teacher
    from .recipe.arguments import DataArguments, ModelArguments
    from .recipe.config import DistillationConfig
    from .teacher_cache.teacher import CachedTeacher
    from .training.trainer import DistillationTrainer

__version__ = "0.1.0.dev0"  # the only place of the version; see CONTRIBUTING.md, "Release"

__all__ = [
    "CachedTeacher",
    "DataArguments",
    "DistillationConfig",
    "DistillationTrainer",
    "ModelArguments",
    "Teacher",
    "inherit_blocks",
    "input_spec",
    "load_student",
    "load_teacher",
]

_HOMES = {
    "CachedTeacher": "teacher_cache.teacher",
    "DataArguments": "recipe.arguments",
    "DistillationConfig": "recipe.config",
    "DistillationTrainer": "training.trainer",
    "ModelArguments": "recipe.arguments",
    "Teacher": "networks.teacher",
    "inherit_blocks": "networks.inheritance",
    "input_spec": "networks.input_spec",
    "load_student": "networks.student_loading",
    "load_teacher": "networks.teacher_loading",
}
_ARCHITECTURES = ("hfkd.models", "hfkd.networks.simkd_student")  # the modules that register with timm


def _public(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'hfkd' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"hfkd.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # else they would take any name for a public one
    __getattr__ = _public


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterAfterTimm(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that registers hfkd's architectures right after the first import of timm.

    The command line must answer `hfkd --help` at once, and timm takes seconds to import. Yet a program that imports
    hfkd and then asks timm, or transformers by way of timm, for one of hfkd's architectures must find it.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)  # the search for timm itself must not come back here
        spec = importlib.util.find_spec("timm")
        sys.meta_path.insert(0, self)  # who asks may only want to know whether timm is installed
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        # Whoever reads them finds timm's own.
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]  # import has set it
        self._loader.exec_module(module)
        _register_architectures()


def _register_architectures() -> None:
    try:
        for name in _ARCHITECTURES:
            importlib.import_module(name)
    except ImportError as error:  # of a name that another version of timm lacks: `import timm` must go on working
        warnings.warn(f"hfkd could not register its architectures with timm: {error}", stacklevel=2)


if "timm" in sys.modules:
    _register_architectures()
else:
    sys.meta_path.insert(0, _RegisterAfterTimm())


def _moved(name: str):
    if name == "load_pretrained":
        return importlib.import_module("hfkd.networks.loading").load_pretrained
    if name not in ("input_spec", "load_student", "load_teacher"):
        raise AttributeError(f"module 'hfkd.loading' has no attribute '{name}': see hfkd and hfkd.networks")
    return _public(name)


# `from hfkd.loading import input_spec` is in programs written after the README of November 2026.
_loading = sys.modules["hfkd.loading"] = ModuleType("hfkd.loading")
vars(_loading)["__getattr__"] = _moved
