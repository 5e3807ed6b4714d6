"""hfkd: teach a small image classifier with a large one, inside the HuggingFace ecosystem."""

from . import models  # noqa: F401  (registers the cifar_* architectures with timm)
from .arguments import DataArguments, DistillationConfig, ModelArguments
from .loading import load_student, load_teacher
from .teacher import Teacher
from .teacher_cache import CachedTeacher
from .trainer import DistillationTrainer

__version__ = "0.1.0"

__all__ = [
    "CachedTeacher",
    "DataArguments",
    "DistillationConfig",
    "DistillationTrainer",
    "ModelArguments",
    "Teacher",
    "load_student",
    "load_teacher",
]
