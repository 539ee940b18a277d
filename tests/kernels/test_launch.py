"""The host's side of a launch: what is remembered, what is refused, and when rows are copied."""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels import launch, private
from fastattn.kernels.launch import (
    allocator,
    contiguous_strides,
    flatten_rows,
    launchable,
    prepare_rows,
)
from fastattn.kernels.structures import (
    Matrix,
    Rows,
    make_odd,
    restore_odd,
    view_matrix,
    view_rows,
)
from support import DEVICE

compiled_path = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter remembers nothing")


class RecordedKernel:
    """Stands for a jitted function: notes the launches that are bound, and those that are not."""

    __name__ = "recorded_kernel"
    __doc__ = "What launchable copies."

    def __init__(
        self,
        names: Sequence[str] = ("x_ptr", "y_ptr", "rows", "cols", "BLOCK"),
        views: dict[str, type] | None = None,
    ) -> None:
        self.params = [
            SimpleNamespace(
                name=name, is_constexpr=name == "BLOCK", do_not_specialize=name == "rows"
            )
            for name in names
        ]
        self.fn = SimpleNamespace(__annotations__=views or {})
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
    driver = SimpleNamespace(get_current_stream=lambda device: "stream")
    monkeypatch.setattr(private, "triton_driver", lambda: driver)
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
def test_a_traceback_shows_the_lines_of_a_launch(kernel):
    with pytest.raises(AttributeError) as caught:
        launchable(kernel).launch((3,), num_warps=4, **arguments(x_ptr="no tensor"))
    *_, frame = traceback.extract_tb(caught.tb)
    assert frame.line == "device = x_ptr.get_device()"
    assert frame.filename.startswith("<launch of recorded_kernel")


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
def test_what_is_bound_is_passed_and_not_asked_for(kernel):
    launch = launchable(kernel).bind(4, cols=16, BLOCK=16)
    for _ in range(2):
        launch((3,), x_ptr=torch.zeros(64), y_ptr=torch.zeros(64), rows=4)
    [(_, bound)] = kernel.bound
    assert (bound["cols"], bound["BLOCK"], bound["num_warps"]) == (16, 16, 4)
    assert kernel.direct[0][-3:] == (4, 16, 16)
    with pytest.raises(TypeError, match="cols"):
        launch((3,), **arguments())


@compiled_path
def test_fresh_pointers_are_passed_and_not_looked_at(kernel):
    launch = launchable(kernel).bind(4, fresh=("y_ptr",), cols=16, BLOCK=16)
    x, aligned, unaligned = torch.zeros(64), torch.zeros(64), torch.zeros(65)[1:]
    half = aligned.half()
    for y in (aligned, unaligned, half, None):
        launch((3,), x_ptr=x, y_ptr=y, rows=4)
    assert len(kernel.bound) == 1
    assert [given[-4] for given in kernel.direct] == [unaligned.data_ptr(), half.data_ptr(), 0]
    launch((3,), x_ptr=unaligned, y_ptr=aligned, rows=4)
    launch((3,), x_ptr=x.half(), y_ptr=aligned, rows=4)
    assert len(kernel.bound) == 3


@compiled_path
def test_strides_come_as_one_tuple(kernel):
    launched = launchable(kernel, strides=("rows", "cols"))
    tensors = {"x_ptr": torch.zeros(64), "y_ptr": torch.zeros(64)}
    for rows in (4, 8):
        launched.launch((3,), num_warps=4, **tensors, strides=(rows, 16), BLOCK=16)
    [(_, bound)] = kernel.bound
    assert (bound["rows"], bound["cols"]) == (4, 16)
    assert kernel.direct[0][-3:] == (8, 16, 16)
    launched.launch((3,), num_warps=4, **tensors, strides=(4, 17), BLOCK=16)
    launched.launch((3,), num_warps=4, **tensors, strides=(2**31, 17), BLOCK=16)
    assert len(kernel.bound) == 3
    with pytest.raises(ValueError, match="unpack"):
        launched.launch((3,), num_warps=4, **tensors, strides=(4,), BLOCK=16)


VIEWS = {"x_view": Rows, "y_view": Matrix}


def viewed(kernel: RecordedKernel, *further: str) -> launchable:
    """A kernel of two views, recorded by `kernel`."""
    kernel.__init__(("x_view", "y_view", *further, "rows", "BLOCK"), VIEWS)
    return launchable(kernel)


@compiled_path
def test_views_are_known_by_dtype_and_width_and_passed_by_address(kernel):
    launched = viewed(kernel)
    x, y = torch.zeros(2, 8), torch.zeros(8, 2)
    for rows in (1, 16):
        views = {"x_view": Rows(x, make_odd(rows)), "y_view": Matrix(y, make_odd(8 * rows), 3)}
        launched.launch((3,), num_warps=4, **views, rows=rows, BLOCK=16)
    [(_, bound)] = kernel.bound
    assert bound["x_view"] == Rows(x, 5)
    assert kernel.direct[0][-4:] == (
        (x.data_ptr(), make_odd(16)),
        (y.data_ptr(), make_odd(128), 3),
        16,
        16,
    )


@compiled_path
@pytest.mark.parametrize(
    "changed",
    [
        {"x_view": Rows(torch.zeros(64).half(), 5)},
        {"x_view": Rows(torch.zeros(64), make_odd(2**31))},
        {"y_view": Matrix(torch.zeros(64), 5, make_odd(2**31))},
        {"y_view": None},
        {"rows": 2**31},
    ],
    ids=["dtype", "width", "width of another", "none", "rows"],
)
def test_other_views_are_bound_anew(kernel, changed):
    launched = viewed(kernel)
    views = {"x_view": Rows(torch.zeros(64), 5), "y_view": Matrix(torch.zeros(64), 5, 3)}
    launched.launch((3,), num_warps=4, **views, rows=1, BLOCK=16)
    for _ in range(2):
        launched.launch((3,), num_warps=4, **{**views, "rows": 1, **changed}, BLOCK=16)
    assert len(kernel.bound) == 2
    [given] = kernel.direct
    if changed.get("y_view", views) is None:
        assert given[-3] is None


@compiled_path
def test_views_of_unaligned_tensors_go_through_triton_every_time(kernel):
    launched = viewed(kernel)
    y = Matrix(torch.zeros(64), 5, 3)
    for _ in range(2):
        x = Rows(torch.zeros(65)[1:], 5)
        launched.launch((3,), num_warps=4, x_view=x, y_view=y, rows=1, BLOCK=16)
    assert len(kernel.bound) == 2


@compiled_path
def test_fresh_and_missing_views_are_passed_and_not_looked_at(kernel):
    bound = viewed(kernel).bind(4, fresh=("x_view",), y_view=None, BLOCK=16)
    for x in (torch.zeros(64), torch.zeros(65)[1:]):
        bound((3,), x_view=Rows(x, 5), rows=1)
    assert kernel.bound[0][1]["y_view"] is None
    assert kernel.direct[0][-4:] == ((x.data_ptr(), 5), None, 1, 16)
    # Their strides are, for nothing else says how wide they are.
    bound((3,), x_view=Rows(x, make_odd(2**31)), rows=1)
    assert len(kernel.bound) == 2


@compiled_path
def test_integers_within_tuples_are_known_by_their_width(kernel):
    launched = viewed(kernel, "own_args")
    views = {"x_view": Rows(torch.zeros(64), 5), "y_view": None}
    for integer in (0, 1, 16, 2**30 - 3):
        own = ((torch.zeros(4), 0.5), (make_odd(integer),))
        launched.launch((3,), num_warps=4, **views, own_args=own, rows=1, BLOCK=16)
    assert len(kernel.bound) == 1
    own = ((torch.zeros(4), 0.5), (make_odd(2**31),))
    launched.launch((3,), num_warps=4, **views, own_args=own, rows=1, BLOCK=16)
    assert len(kernel.bound) == 2


INTEGERS = (0, 1, -1, 2, -2, 15, 16, -16, 2**30 - 2, 2**30, -(2**30), 2**40, 2**62 - 2, -(2**62))


def test_odd_numbers_are_not_specialised_upon():
    odd = [make_odd(integer) for integer in INTEGERS]
    assert all(integer % 2 == 1 and integer != 1 for integer in odd)
    assert len(set(odd)) == len(INTEGERS)


@triton.jit
def restore_kernel(restored_ptr, integer):
    tl.store(restored_ptr, restore_odd(integer))


@pytest.mark.kernels
def test_kernels_restore_odd_numbers():
    restored = torch.empty(1, dtype=torch.int64, device=DEVICE)
    for integer in INTEGERS:
        restore_kernel[(1,)](restored, make_odd(integer))
        assert restored.item() == integer


def test_views_of_tensors():
    x = torch.zeros(6, 20)[:, 3:11]
    rows = view_rows(x, 8)
    assert (rows.pointer.data_ptr(), rows.stride) == (x.data_ptr(), make_odd(20))
    matrix = view_matrix(x.t())
    assert matrix[1:] == (make_odd(1), make_odd(20))


@compiled_path
def test_a_launch_is_on_the_device_of_its_tensors(kernel, monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        outer, current[0] = current[0], index
        yield
        current[0] = outer

    cuda = SimpleNamespace(current_device=lambda: current[0], device=device)
    monkeypatch.setattr(launch, "torch", SimpleNamespace(cuda=cuda, Tensor=torch.Tensor))
    monkeypatch.setattr(launch, "several_gpus", lambda: True)
    launched = launchable(kernel)
    devices = []
    monkeypatch.setattr(kernel, "run", lambda *given: devices.append(current[0]))
    launched.launch((3,), num_warps=4, **arguments())
    # A CPU tensor's index is -1.
    launched.launch((3,), num_warps=4, **arguments())
    assert devices == [-1]
    assert current == [0]


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


@pytest.mark.kernels
@pytest.mark.skipif(not launch.INTERPRETED, reason="about the interpreter")
def test_the_interpreter_is_given_each_stride(kernel):
    launched = launchable(kernel, strides=("rows", "cols"))
    tensors = {"x_ptr": torch.zeros(64), "y_ptr": torch.zeros(64)}
    launched.launch((3,), num_warps=4, **tensors, strides=(4, 16), BLOCK=16)
    launched.bind(4, BLOCK=16)((3,), **tensors, strides=(4, 16))
    for _, given in kernel.bound:
        assert (given["rows"], given["cols"]) == (4, 16)
        assert set(given) == set(arguments())


def test_a_launchable_keeps_the_name_and_text_of_its_kernel(kernel):
    launched = launchable(kernel)
    assert launched.__name__ == "recorded_kernel"
    assert launched.__doc__ == "What launchable copies."


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (4, 1, 6), (0, 3), (3, 0)], ids=str)
def test_allocated_tensors_are_as_torch_makes_them(shape):
    assert contiguous_strides(shape) == torch.empty(shape).stride()
    for device in (torch.empty(0, device=DEVICE).device, torch.device("meta")):
        made = allocator(device)(shape, contiguous_strides(shape), torch.bfloat16)
        assert (made.shape, made.dtype) == (torch.Size(shape), torch.bfloat16)
        assert (made.device, made.stride()) == (device, contiguous_strides(shape))
    transposed = allocator(torch.device("cpu"))((2, 3), (1, 2), torch.float32)
    assert transposed.stride() == (1, 2)


def test_with_several_gpus_memory_is_on_the_one_asked_for(monkeypatch):
    asked = []

    def empty_strided(*given: Any, **options: Any) -> None:
        asked.append((given, options))

    monkeypatch.setattr(launch, "several_gpus", lambda: True)
    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    device = torch.device("cuda", 1)
    allocator.__wrapped__(device)((2,), (1,), torch.float32)
    assert asked == [(((2,), (1,)), {"dtype": torch.float32, "device": device})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 3, 8), torch.randn(6, 20)[:, 3:11], torch.randn(8, 6).t(), torch.randn(0, 8)],
    ids=["contiguous", "columns", "transposed", "empty"],
)
def test_rows_and_what_they_become(x, dtype):
    rows, stride, empty = prepare_rows(x, x.shape[-1], dtype)
    assert torch.equal(rows.reshape(x.shape), x)
    assert stride == (x.shape[-1] if x.numel() == 0 else flatten_rows(x, x.shape[-1])[1])
    assert (empty.shape, empty.dtype) == (x.shape, dtype)
    assert empty.is_contiguous()


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
    rows, found = flatten_rows(x, x.shape[-1])
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
    rows, stride = flatten_rows(x, x.shape[-1])
    assert rows.data_ptr() != x.data_ptr()
    assert rows.stride(-1) == 1
    assert stride == x.shape[-1]
    assert torch.equal(rows.reshape(x.shape), x)


@pytest.mark.kernels
def test_device_of_this_process_has_a_target():
    from fastattn.kernels.config import find_target

    target = find_target(torch.zeros(1, device=DEVICE))
    assert target.multiprocessors >= 1
    assert target.shared_memory >= 1 << 14
    assert (target.backend == "interpreter") is launch.INTERPRETED
