"""Run tasks in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection

from .measure import Failure, Outcome, Task, run

SOCKET_PATH = 108
"""Bytes that a socket's path may have on Linux."""
SOCKET_NAME = 40
"""Bytes of what multiprocessing appends to the folder: `/pymp-xxxxxxxx/listener-xxxxxxxx`."""


def run_all(tasks: Sequence[Task], jobs: int, time_limit: float) -> Iterator[tuple[Task, Outcome]]:
    """Yield each task with its outcome, as they finish.

    Each task gets a new process: Triton keeps kernels by device, and a process stands for one
    device. The processes are forked from a server that has imported everything already. A compiler
    that takes its process down with it, or that needs more seconds than `time_limit`, becomes a
    failure of that task.
    """
    # The server listens at a socket in the folder of temporary files, whose path has few bytes.
    if len(tempfile.gettempdir()) < SOCKET_PATH - SOCKET_NAME:
        context = multiprocessing.get_context("forkserver")
    else:
        context = multiprocessing.get_context("spawn")
    # The backward pass would import the last one in every process anew.
    context.set_forkserver_preload(
        ["torch", "triton", __name__, "torch.fx.experimental.symbolic_shapes"]
    )

    def outcome_of(task: Task) -> Outcome:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_outcome, args=(sender, task))
        process.start()
        sender.close()
        try:
            if receiver.poll(time_limit):
                return receiver.recv()
            process.kill()
            reason = f"compiling took longer than {time_limit:g} s"
        except EOFError:
            process.join()
            reason = f"the compiling process ended with exit code {process.exitcode}"
        finally:
            process.join()
        failure = Failure(task.op, "", task.shapes[0], task.dtype, task.target, reason)
        return Outcome((), (failure,))

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(outcome_of, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _send_outcome(sender: Connection, task: Task) -> None:
    sender.send(run(task))
