"""SIGTERM, by which clusters end a job, or a time that is up: a checkpoint, then the end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

EXIT_CODE = 128 + signal.SIGTERM


class StopOnSigterm(TrainerCallback):
    """While training, SIGTERM, or `time_is_up`, has the step in hand finished, a checkpoint written, training ended.

    A checkpoint of an epoch's last step, whoever asks for it, waits for what else is due then: a run that is resumed
    from it begins with the next epoch, and would leave out the log and the evaluation of this one.

    Processes agree on the step: each tells the others after every step whether it is to stop, and all act on what was
    said a step before, so that none waits for this.

    Attributes:
        time_is_up: asked after every step; another reason to stop than SIGTERM.
        stopping: whether training ends with the next checkpoint.
        stopped: whether training was ended so.
    """

    def __init__(self):
        self.time_is_up: Callable[[], bool] = lambda: False
        self.stopping = self.stopped = False
        self._signalled = False
        self._save_after_epoch = False
        self._group = None
        self._said: torch.Tensor | None = None
        self._exchange: torch.distributed.Work | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM for a while; afterwards whoever had it before has it again."""
        self.stopping = self.stopped = self._signalled = False
        if threading.current_thread() is not threading.main_thread():  # Python lets no other one handle signals
            yield
            return
        former = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)  # None: it was not Python's

    def _on_signal(self, number, frame):
        self._signalled = True

    def on_train_begin(self, args, state, control, **kwargs):
        self._exchange = None
        if args.world_size > 1 and self._group is None:
            # Whatever the gradients go by: a flag on the CPU.
            self._group = torch.distributed.new_group(timeout=timedelta(seconds=args.ddp_timeout), backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        # DefaultFlowCallback, which comes first, has said what is due after this step.
        self.stopping = self._agreed(args.world_size)
        control.should_save = control.should_save or self.stopping
        if float(state.epoch).is_integer() or state.global_step >= state.max_steps:
            self._save_after_epoch, control.should_save = control.should_save, False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # in its middle, so what is due at its end is not due yet
            control.should_log = control.should_evaluate = control.should_save = False
            return control
        self.stopping = self.stopping or self._agreed(args.world_size)
        control.should_save = control.should_save or self._save_after_epoch or self.stopping
        self._save_after_epoch = False
        return control

    def on_save(self, args, state, control, **kwargs):
        # Only now: a checkpoint holds `control`, and a resumed run is not to stop again.
        if self.stopping:
            reason = "SIGTERM" if self._signalled else "The time is up"
            logger.warning(f"{reason}: checkpoint-{state.global_step} is written, and training ends here.")
            self.stopped = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        if self._exchange is not None:
            self._exchange.wait()

    def _agreed(self, world_size: int) -> bool:
        """Is any process to stop? The same answer in all of them."""
        asked = self._signalled or self.time_is_up()
        if world_size == 1:
            return asked
        stop = False
        if self._exchange is not None:
            self._exchange.wait()
            stop = bool(self._said)
        self._said = torch.tensor(int(asked))
        self._exchange = torch.distributed.all_reduce(
            self._said, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return stop


def ignore_sigterm(former: Callable[[int], None] | None, worker: int) -> None:
    """Initialises a DataLoader's worker. Clusters signal every process of a job; if a worker ended by it, so would
    training, before it has written its checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if former is not None:
        former(worker)
