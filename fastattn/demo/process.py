"""A training run in a process of its own.

Each run gets one because Triton decides at import whether kernels are interpreted, because the
peak memory of a process is only its own if nothing else ran in it, and because a run can then
end badly without taking the other's results along.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from . import DemoError
from .training import Event, Job, RunRecord, train


def run_in_process(job: Job, watch: Callable[[RunRecord, Event], None]) -> RunRecord:
    """Do a run in another process, and call `watch` after each event with the record so far.

    Returns:
        What the run reported, with `interrupted` set if Ctrl-C ended it and `failure` if it ended
        for a reason that the user should read.

    Raises:
        RuntimeError: if the run ended in a way that has no explanation; its traceback is then on
            standard error.
    """
    record = RunRecord(job)
    events, sent = multiprocessing.Pipe(duplex=False)
    # Closing the other end says stop, as the system does if we are killed.
    stop, running = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=report_run, args=(job, sent, stop))

    def interrupt(*_: object) -> None:
        """End the run after its present step the first time, at once the second."""
        if record.interrupted:
            process.kill()
        record.interrupted = True
        running.close()

    # What is ignored while it starts, the process itself ignores: we pass Ctrl-C on.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    interpreted = os.environ.get("TRITON_INTERPRET", "0")
    os.environ["TRITON_INTERPRET"] = "1" if job.interpreted else "0"
    try:
        process.start()
        signal.signal(signal.SIGINT, interrupt)
        sent.close()
        with contextlib.suppress(EOFError):
            while True:
                event = events.recv()
                record.add(event)
                watch(record, event)
        process.join()
    finally:
        os.environ["TRITON_INTERPRET"] = interpreted
        signal.signal(signal.SIGINT, handler)

    if process.exitcode != 0 and not record.interrupted:
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the {job.variant} run ended with exit code {process.exitcode}")
        record.failure = "the run was killed, probably for want of memory"
    return record


def report_run(job: Job, events: Connection, stop: Connection) -> None:
    """Do a run and send its events, until there is nothing more to be read from `stop`."""
    # Whatever else is printed is none of the demo's output.
    sys.stdout = sys.stderr
    try:
        train(job, events.send, stop.poll)
    except BrokenPipeError:
        # Nobody listens any more.
        sys.exit(1)
    except torch.OutOfMemoryError:
        events.send({"failure": "the device ran out of memory; try a smaller --batch"})
    except OSError as error:
        events.send({"failure": explain(error)})
    except DemoError as error:
        events.send({"failure": str(error)})


def explain(error: OSError) -> str:
    """What the system says is wrong, and with which file if it says that."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
