"""Preemption: a checkpoint and the end of training on SIGTERM, Ctrl-C, a closed terminal, or at a time limit."""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
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
# Clusters end a job by SIGTERM, a person by Ctrl-C (SIGINT) or by closing the terminal (SIGHUP).
CAUSES = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "The terminal was closed",
}
INTERRUPTED = b"\nCtrl-C: training ends with a checkpoint after this step. Press it again to end at once.\n"


class StopOnSigterm(TrainerCallback):
    """Callback that, on a signal or once `time_is_up`, finishes the step, writes a checkpoint and ends training.

    The signals are SIGTERM, SIGINT and SIGHUP. A second Ctrl-C ends at once, without a checkpoint.

    A checkpoint at an epoch's last step is delayed until the epoch's log and evaluation are done. A run resumed from it
    begins with the next epoch and would leave them out.

    All processes stop after the same step. After every step each process starts to send its flag to the others, and
    reads the result one step later, so that no process waits for the others.

    Attributes:
        time_is_up: function called after every step; if it returns True, training stops as on a signal.
        stopping: True if training ends with the next checkpoint.
        stopped: True if training was ended by this callback.
    """

    def __init__(self):
        self.time_is_up: Callable[[], bool] = lambda: False
        self.stopping = self.stopped = False
        self._signal: signal.Signals | None = None
        self._terminals: list[int] = []
        self._save_after_epoch = False
        self._group = None
        self._stop_flag: torch.Tensor | None = None
        self._all_reduce: torch.distributed.Work | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the context, and restore the former handlers afterwards."""
        self.stopping = self.stopped = False
        self._signal = None
        if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
            yield
            return
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        former = {number: signal.getsignal(number) for number in CAUSES}
        # nohup lets a job ignore SIGHUP, and a shell lets one in the background ignore SIGINT: they stay ignored.
        handled = [number for number in CAUSES if number == signal.SIGTERM or former[number] != signal.SIG_IGN]
        for number in handled:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number in handled:
                # None stands for a handler that was not installed from Python, which cannot be restored.
                signal.signal(number, signal.SIG_DFL if former[number] is None else former[number])

    def _on_signal(self, number, frame):
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        # Only a flag: the signal may arrive within a step, where a checkpoint would be inconsistent.
        self._signal = signal.Signals(number)
        if number == signal.SIGINT and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            os.write(2, INTERRUPTED)  # print is not safe in a handler
        if number == signal.SIGHUP:
            self._leave_terminal()

    def _leave_terminal(self) -> None:
        """Send what would be written to the closed terminal nowhere; writing there would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    @property
    def exit_code(self) -> int:
        """Exit code of a run that was stopped: that of its signal, and at a time limit that of SIGTERM."""
        return EXIT_CODE if self._signal is None else 128 + self._signal

    def on_train_begin(self, args, state, control, **kwargs):
        self._all_reduce = None
        if args.world_size > 1 and self._group is None:
            # A separate group: the flag is on the CPU, which the backend of the gradients (NCCL) may not support.
            self._group = torch.distributed.new_group(timeout=timedelta(seconds=args.ddp_timeout), backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        # DefaultFlowCallback runs before this one, so `control` holds what is due after this step.
        self.stopping = self._any_process_stops(args.world_size)
        control.should_save = control.should_save or self.stopping
        if float(state.epoch).is_integer() or state.global_step >= state.max_steps:
            self._save_after_epoch, control.should_save = control.should_save, False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # training stopped within the epoch, so nothing is due that belongs to its end
            control.should_log = control.should_evaluate = control.should_save = False
            return control
        self.stopping = self.stopping or self._any_process_stops(args.world_size)
        control.should_save = control.should_save or self._save_after_epoch or self.stopping
        self._save_after_epoch = False
        return control

    def on_save(self, args, state, control, **kwargs):
        # Set after the checkpoint is written: it holds `control`, and a resumed run must not stop at once.
        if self.stopping:
            cause, hint = "The time is up", ""
            if self._signal is not None:
                cause, hint = CAUSES[self._signal], " The same command goes on with --resume_from_checkpoint true."
            logger.warning(f"{cause}: checkpoint-{state.global_step} was written, and training ends here.{hint}")
            self.stopped = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        # A process must not leave while others still wait for its last flag.
        if self._all_reduce is not None:
            self._all_reduce.wait()

    def _any_process_stops(self, world_size: int) -> bool:
        """Return True if any process is to stop; the answer is the same in all processes."""
        asked = self._signal is not None or self.time_is_up()
        if world_size == 1:
            return asked
        # The result of the step before is read, and the next exchange is started. All processes started the former
        # after the same step, so they get the same answer. Reading this step's flag would make every step wait for the
        # slowest process.
        stop = False
        if self._all_reduce is not None:
            self._all_reduce.wait()
            stop = bool(self._stop_flag)
        self._stop_flag = torch.tensor(int(asked))
        self._all_reduce = torch.distributed.all_reduce(
            self._stop_flag, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return stop


@functools.cache
def end_workers_at_exit(process: int) -> None:
    """End the workers of DataLoaders with this process, where `process` is its id.

    multiprocessing ends them by SIGTERM and waits for them. They ignore it, so a loader that is still referred to, such
    as one with persistent workers in a trainer that a script keeps, would let the process wait forever.
    """

    def kill() -> None:
        if os.getpid() == process:  # not in a fork
            for child in multiprocessing.active_children():
                if child.daemon:
                    child.kill()

    atexit.register(kill)


def ignore_signals(former: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a DataLoader worker that ignores the signals by which a run is ended.

    Clusters send SIGTERM to every process of a job, and terminals SIGINT and SIGHUP. If a worker ended, training would
    fail before its checkpoint is written.
    """
    for number in CAUSES:
        signal.signal(number, signal.SIG_IGN)
    if former is not None:
        former(worker)
