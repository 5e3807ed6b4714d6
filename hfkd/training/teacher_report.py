"""Report of the teacher's own accuracy, since a teacher that is shown wrong images or classes teaches in silence."""

from __future__ import annotations

import weakref

from transformers import Trainer, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

NEAR_CHANCE = 0.1  # share of the way from chance to 100 % that a teacher should have gone
WHAT_TO_CHECK = (
    "Check that it is shown images as in its own training (teacher_image_size, teacher_image_mean, teacher_image_std), "
    "and that its classes are the data set's (teacher_class_indices)."
)


class TeacherReport(TrainerCallback):
    """Callback that prints the teacher's top-1 before the first epoch, and warns of one that seems wrong.

    Where nothing can be remembered of the evaluation images, it prints the top-1 after the first evaluation instead. It
    refers to the trainer weakly: a trainer in a circle of references would outlive its last use.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = weakref.proxy(trainer)
        self.told = self.warned = False

    def on_train_begin(self, args, state, control, **kwargs):
        if self.told or state.global_step > 0:  # told before, by an earlier trial or by the run that is resumed
            return
        top1 = self.trainer.teacher_top1()
        if top1 is not None:
            self._tell(top1, state)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        top1 = metrics.get("eval_teacher_top1")
        if top1 is None:
            return
        if not self.told:
            self._tell(top1, state)
        students = metrics.get("eval_top1", 0.0)
        if students > top1 and not self.warned and state.is_world_process_zero:
            self.warned = True
            logger.warning(
                f"The student's top-1, {students:.2f}, is above its teacher's, {top1:.2f}. If the teacher should be "
                f"better: {WHAT_TO_CHECK}"
            )

    def _tell(self, top1: float, state) -> None:
        self.told = True
        if not state.is_world_process_zero:
            return
        print(
            f"The teacher {self.trainer.teacher.name} has a top-1 of {top1:.2f} on the evaluation images.", flush=True
        )
        classes = self.trainer.num_classes
        chance = 100 / classes if classes else 0.0
        if classes and top1 < chance + NEAR_CHANCE * (100 - chance):
            self.warned = True
            logger.warning(f"The teacher's top-1, {top1:.2f}, is near chance, {chance:.3g}. {WHAT_TO_CHECK}")
