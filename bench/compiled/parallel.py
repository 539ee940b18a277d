"""Run tasks in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection

from .measure import Failure, Outcome, Task, run


def run_all(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Outcome]]:
    """Yield each task with its outcome, as they finish.

    Each task gets a new process: Triton keeps kernels by device, and a process stands for one
    device. The processes are forked from a server that has imported everything already, and a
    compiler that takes its process down with it becomes a failure of that task.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton", __name__])

    def outcome_of(task: Task) -> Outcome:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_outcome, args=(sender, run, task))
        process.start()
        sender.close()
        try:
            outcome = receiver.recv()
        except EOFError:
            process.join()
            reason = f"the compiling process ended with exit code {process.exitcode}"
            failure = Failure(task.op, "", task.shapes[0], task.dtype, task.target, reason)
            outcome = Outcome((), (failure,))
        process.join()
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(outcome_of, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _send_outcome(sender: Connection, work: Callable[[Task], Outcome], task: Task) -> None:
    sender.send(work(task))
