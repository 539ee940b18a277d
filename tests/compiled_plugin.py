"""The tests of kernels, run on compiled code: `pytest --compiled sm_90 -m kernels tests/ops`.

What a test launches is compiled for the target and executed by fastattn.machine on CPU tensors. A
test fails as well if the machine reports one of its kernels, though its numbers are right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

import support


class CompiledRun:
    """A pytest plugin that stands in for a GPU."""

    def __init__(self, target: str, variation: int | None = None) -> None:
        from fastattn.machine.execution import execute
        from fastattn.machine.variation import Variation
        from fastattn.ops.core import backends

        if backends.INTERPRETED:
            raise pytest.UsageError("--compiled and TRITON_INTERPRET exclude each other")
        self.target = target
        self.scopes = contextlib.ExitStack()
        self.execution = self.scopes.enter_context(
            execute(target, None if variation is None else Variation(variation))
        )
        self.scopes.enter_context(backends.assume_gpu())
        # In all threads: those that a test starts have choices of their own.
        backends._obstacles["cpu", None] = None
        support.DEVICE = "cpu"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Fail a test for what its kernels were reported for."""
        self.execution.reports.clear()
        result: Any = yield
        if self.execution.reports:
            pytest.fail("\n".join(self.execution.reports[:5]), pytrace=False)
        return result

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say how much was executed."""
        launches, seconds = self.execution.launches, self.execution.seconds
        terminalreporter.write_line(
            f"{launches.total()} launches of {len(launches)} kernels compiled for {self.target} "
            f"took {sum(seconds.values()):.0f} s"
        )

    def pytest_unconfigure(self) -> None:
        """Give Triton its own driver back."""
        self.scopes.close()
