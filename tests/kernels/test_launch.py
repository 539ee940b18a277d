"""The host's side of a launch: what is remembered, what is refused, and when rows are copied."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastattn.kernels import launch
from fastattn.kernels.launch import launchable, rows_of
from support import DEVICE

compiled_path = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter remembers nothing")


class RecordedKernel:
    """Stands for a jitted function: notes the launches that are bound, and those that are not."""

    __name__ = "recorded_kernel"
    __doc__ = "What launchable copies."

    def __init__(self) -> None:
        self.params = [
            SimpleNamespace(
                name=name, is_constexpr=name == "BLOCK", do_not_specialize=name == "rows"
            )
            for name in ("x_ptr", "y_ptr", "rows", "cols", "BLOCK")
        ]
        self.bound: list[tuple[tuple, dict[str, Any]]] = []
        self.direct: list[tuple] = []

    def __getitem__(self, grid: tuple) -> Any:
        def bind(**arguments: Any) -> Any:
            self.bound.append((grid, arguments))
            return SimpleNamespace(run=self.run, function="function", packed_metadata="metadata")

        return bind

    def run(self, *given: Any) -> None:
        self.direct.append(given)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> RecordedKernel:
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: "stream"))
    monkeypatch.setattr(launch, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    monkeypatch.setattr(launch, "several_gpus", lambda: False)
    return RecordedKernel()


def arguments(**changed: Any) -> dict[str, Any]:
    plain = {"x_ptr": torch.zeros(64), "y_ptr": torch.zeros(64), "rows": 4, "cols": 16, "BLOCK": 16}
    return {**plain, **changed}


@compiled_path
def test_a_repeated_launch_is_spared_the_binding(kernel):
    launched = launchable(kernel)
    launched.launch((3,), num_warps=4, **arguments())
    again = arguments(rows=1000)
    launched.launch((5, 2), num_warps=4, **again)
    [(grid, bound)] = kernel.bound
    assert grid == (3,)
    assert (bound["num_warps"], bound["num_stages"]) == (4, 3)
    [given] = kernel.direct
    assert given[:6] == (5, 2, 1, "stream", "function", "metadata")
    addresses = again["x_ptr"].data_ptr(), again["y_ptr"].data_ptr()
    assert given[-5:] == (*addresses, 1000, 16, 16)


@compiled_path
def test_the_order_of_keywords_does_not_matter(kernel):
    launched = launchable(kernel)
    for _ in range(2):
        launched.launch((3,), num_warps=4, **dict(reversed(arguments().items())))
    assert kernel.direct[0][-3:] == (4, 16, 16)


@compiled_path
@pytest.mark.parametrize(
    "changed",
    [
        {"x_ptr": torch.zeros(64, dtype=torch.float16)},
        {"y_ptr": None},
        {"cols": 17},
        {"BLOCK": 32},
        {"rows": 2**31},
        {"num_warps": 8},
        {"num_stages": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_triton_would_compile_anew_is_bound_anew(kernel, changed):
    launched = launchable(kernel)
    launched.launch((3,), **arguments(num_warps=4))
    launched.launch((3,), **arguments(**{"num_warps": 4, **changed}))
    assert len(kernel.bound) == 2
    assert not kernel.direct


@compiled_path
def test_unaligned_pointers_go_through_triton_every_time(kernel):
    launched = launchable(kernel)
    launched.launch((3,), num_warps=4, **arguments())
    for _ in range(2):
        launched.launch((3,), num_warps=4, **arguments(x_ptr=torch.zeros(65)[1:]))
    assert len(kernel.bound) == 3
    assert not kernel.direct
    # And leave nothing behind that an aligned launch would take.
    launched.launch((3,), num_warps=4, **arguments())
    assert len(kernel.direct) == 1


@compiled_path
def test_profilers_see_every_launch(kernel, monkeypatch):
    monkeypatch.setattr(launch, "launch_hooks", SimpleNamespace(calls=[print]))
    launched = launchable(kernel)
    for _ in range(2):
        launched.launch((3,), num_warps=4, **arguments())
    assert len(kernel.bound) == 2


@compiled_path
def test_forgotten_and_unknown_arguments_are_refused(kernel):
    launched = launchable(kernel)
    short = arguments()
    del short["BLOCK"]
    with pytest.raises(TypeError, match="BLOCK"):
        launched.launch((3,), num_warps=4, **short)
    with pytest.raises(TypeError, match="extra"):
        launched.launch((3,), num_warps=4, **arguments(extra=1))
    with pytest.raises(TypeError, match="num_warps"):
        launched.launch((3,), **arguments())
    assert not kernel.bound


@compiled_path
def test_handles_do_not_pile_up(kernel, monkeypatch):
    monkeypatch.setattr(launch, "MOST_HANDLES", 8)
    launched = launchable(kernel)
    for cols in range(100):
        launched.launch((1,), num_warps=4, **arguments(cols=cols))
        assert len(launched._handles) <= 8


@pytest.mark.kernels
@pytest.mark.skipif(not launch.INTERPRETED, reason="about the interpreter")
def test_the_interpreter_is_called_each_time_without_launch_options(kernel):
    launched = launchable(kernel)
    for _ in range(2):
        launched.launch((3,), num_warps=4, num_stages=2, **arguments())
    assert [grid for grid, _ in kernel.bound] == [(3,), (3,)]
    assert set(kernel.bound[0][1]) == set(arguments())


def test_a_launchable_keeps_the_name_and_text_of_its_kernel(kernel):
    launched = launchable(kernel)
    assert launched.__name__ == "recorded_kernel"
    assert launched.__doc__ == "What launchable copies."


@pytest.mark.parametrize(
    ("view", "stride"),
    [
        (lambda: torch.randn(6, 8), 8),
        (lambda: torch.randn(2, 3, 8), 8),
        (lambda: torch.randn(8), 8),
        (lambda: torch.randn(6, 20)[:, 3:11], 20),
        (lambda: torch.randn(12, 8)[::2], 16),
        (lambda: torch.randn(2, 3, 20)[..., :8], 20),
        (lambda: torch.randn(1, 8).expand(6, 8), 0),
        (lambda: torch.randn(6, 4)[:, :1], 4),
    ],
    ids=["matrix", "batch", "one row", "columns", "rows", "columns of a batch", "expanded", "one"],
)
def test_rows_at_one_distance_are_read_in_place(view, stride):
    x = view()
    rows, found = rows_of(x)
    assert found == stride
    assert rows.data_ptr() == x.data_ptr()
    assert torch.equal(rows.reshape(x.shape), x)


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(8, 6).t(),
        lambda: torch.randn(6, 16)[:, ::2],
        lambda: torch.randn(2, 4, 8)[:, :3],
        lambda: torch.randn(3, 2, 8).transpose(0, 1),
        lambda: torch.randn(6, 1).expand(6, 8),
    ],
    ids=["transposed", "every other column", "gaps", "batch inside", "expanded columns"],
)
def test_other_layouts_are_copied_once(view):
    x = view()
    rows, stride = rows_of(x)
    assert rows.data_ptr() != x.data_ptr()
    assert rows.stride(-1) == 1
    assert stride == x.shape[-1]
    assert torch.equal(rows.reshape(x.shape), x)


@pytest.mark.kernels
def test_device_of_this_process_has_a_target():
    from fastattn.kernels.config import target_of

    target = target_of(torch.zeros(1, device=DEVICE))
    assert target.multiprocessors >= 1
    assert target.shared_memory >= 1 << 14
    assert (target.backend == "interpreter") is launch.INTERPRETED
