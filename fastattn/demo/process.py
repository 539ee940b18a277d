"""A training run in a process of its own.

Each run gets one because Triton decides at import whether kernels are interpreted, because the
peak memory of a process is only its own if nothing else ran in it, and because a run can then
end badly without taking the other's results along.

The run writes its events to standard output, one JSON object a line. It ends early when its
standard input is closed: by us on Ctrl-C, or by the system if we are killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict

import torch

from . import DemoError
from .data import Corpus
from .model import Sizes
from .training import Event, Job, RunRecord, train


def run_in_process(job: Job, watch: Callable[[RunRecord, Event], None]) -> RunRecord:
    """Do the run in another process.

    Args:
        job: what to train.
        watch: called after each event with the record so far and the event.

    Returns:
        What the run reported, with `interrupted` set if Ctrl-C ended it and `failure` if it ended
        for a reason that the user should read.

    Raises:
        RuntimeError: if the run ended in a way that has no explanation; its traceback is then on
            standard error.
    """
    record = RunRecord(job)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if job.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastattn.demo.process", json.dumps(asdict(job))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # In a session of its own the run does not get the terminal's Ctrl-C: we pass it on.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    close_input = process.stdin.close

    def on_interrupt(*_: object) -> None:
        """End the run after its present step the first time, at once the second."""
        if record.interrupted:
            process.kill()
        record.interrupted = True
        close_input()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with process:
            for line in process.stdout:
                event = json.loads(line)
                record.add(event)
                watch(record, event)
    finally:
        signal.signal(signal.SIGINT, previous)

    if process.returncode != 0 and not record.interrupted:
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the {job.variant} run ended with exit code {process.returncode}")
        record.failure = "the run was killed, probably for want of memory"
    return record


def main() -> int:
    """Do the run that the first argument describes."""
    description = json.loads(sys.argv[1])
    description["sizes"] = Sizes(**description["sizes"])
    description["corpus"] = Corpus(**description["corpus"])
    job = Job(**description)

    # Whatever else is printed must not end up among the events.
    events, sys.stdout = sys.stdout, sys.stderr

    def emit(event: Event) -> None:
        print(json.dumps(event), file=events, flush=True)

    stop = threading.Event()
    threading.Thread(target=_set_at_end_of_input, args=(stop,), daemon=True).start()
    try:
        train(job, emit, stop.is_set)
    except BrokenPipeError:
        # Nobody listens any more.
        return 1
    except torch.OutOfMemoryError:
        emit({"failure": "the device ran out of memory; try a smaller --batch"})
    except (DemoError, OSError) as error:
        emit({"failure": explain(error) if isinstance(error, OSError) else str(error)})
    return 0


def explain(error: OSError) -> str:
    """What the system says is wrong, and with which file if it says that."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _set_at_end_of_input(stop: threading.Event) -> None:
    # Not through sys.stdin: a thread that waits in there at exit aborts the interpreter.
    while os.read(0, 1024):
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
