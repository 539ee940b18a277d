"""The benchmarks as pytest-benchmark sees them: `python -m bench`, or pytest on this file.

pytest-benchmark runs all rounds of one function before it turns to the next. Here the contenders of
a case take turns (runner.py), and a GPU's time lies between events, not on the wall clock. So
a case is measured first, and each contender's rounds are then replayed to pytest-benchmark on a
clock that moves by what was measured: its statistics, files, histograms and comparisons work on the
alternated numbers. Without the plugin only the replay is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.contenders import OURS
from bench.op import DIRECTIONS
from bench.timing.session import Case, Session

SESSION = "fastattn-bench"
"""The name under which `python -m bench` registers its session with pytest."""


class ReplayClock:
    """A clock that advances by recorded durations."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, durations: Iterator[float]) -> None:
        """Move on by the next duration."""
        self.now += next(durations)


CLOCK = ReplayClock()


def session_of(config: pytest.Config) -> Session:
    """The session of `python -m bench`, or a quick one."""
    session = config.pluginmanager.get_plugin(SESSION)
    if session is None:
        session = Session()
        config.pluginmanager.register(session, SESSION)
    return session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    metafunc.parametrize(
        ("case", "direction", "contender"),
        [
            pytest.param(case, direction, contender, id=f"{case}-{direction}-{contender}")
            for case in session.cases
            for direction in DIRECTIONS
            for contender in session.contenders(case)
        ],
    )


@pytest.mark.benchmark(timer=CLOCK)
def test_speed(request: pytest.FixtureRequest, case: Case, direction: str, contender: str) -> None:
    session = session_of(request.config)
    if session.out_of_time(case):
        pytest.skip("no time left")
    outcome = session.outcome(case)
    if contender in outcome.failures:
        reason = outcome.failures[contender]
        assert contender != OURS, reason
        pytest.skip(f"{contender}: {reason}")
    seconds = outcome.measured[contender].seconds.get(direction)
    if seconds is None:
        pytest.skip(f"{contender} has no {direction}")
    if request.config.pluginmanager.has_plugin("benchmark"):
        replay(request.getfixturevalue("benchmark"), f"{case} {direction}", contender, seconds)


def replay(benchmark: Any, group: str, contender: str, seconds: list[float]) -> None:
    """Give recorded durations to pytest-benchmark."""
    benchmark.group = group
    benchmark.extra_info["contender"] = contender
    benchmark.pedantic(CLOCK.advance, args=(iter(seconds),), rounds=len(seconds))
