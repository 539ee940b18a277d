"""Private names of torch and Triton: why each is used, and what would be done without it.

Such names change without notice. All that fastattn uses stand here, so that one file is looked
through for a new version; tests/test_private_names.py says which of them that no longer has, and
that no other file uses any. Triton is imported where something of it is asked for, and not before:
ops use this file where there is none.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.utils._python_dispatch
from torch.nn.modules import transformer

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

NAMES = {
    "torch._C._len_torch_dispatch_stack": (
        "Counts the modes that watch every operation, and would not see a direct launch. Without "
        "it every call would go through a registered op, which asks for itself: ten microseconds."
    ),
    "torch._C._are_functorch_transforms_active": (
        "Tells whether torch.func transforms what is called, which then needs PyTorch's own apply "
        "of a Function. Without it that would serve always, for 15 microseconds more."
    ),
    "torch.autograd.forward_ad._current_level": (
        "Tells of forward-mode derivatives, which a Function refuses once it is applied. Without "
        "it one would be applied, and recorded, also where no gradient is wanted."
    ),
    "torch.autograd.Function._backward_cls": (
        "Has the apply that a backward pass calls, and that finds the method `backward` anew each "
        "time. Without it that would be done, for two microseconds a backward."
    ),
    "torch.compiler.assume_constant_result(lambda: 0)._dynamo_marked_constant": (
        "Has Dynamo run a function where it would trace it. Without it "
        "torch.compiler.assume_constant_result would set it, and import Dynamo with fastattn."
    ),
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack": (
        "Finds counters of operations that were made before an op was registered. Without it ops "
        "would be registered at import, which takes a millisecond each."
    ),
    "torch._C._get_cublas_allow_tf32": (
        "PyTorch's one answer to all its settings of float32 products. Without it "
        "torch.backends.cuda.matmul.allow_tf32 would be asked, which takes two microseconds."
    ),
    "torch.nn.Module()._forward_hooks": (
        "Says who listens when a module is called. Without it, and the other three, a module whose "
        "work a kernel does would be called, or its listeners would hear nothing."
    ),
    "torch.nn.Module()._forward_pre_hooks": "The same, before the call.",
    "torch.nn.Module()._backward_hooks": "The same, when its gradients are computed.",
    "torch.nn.Module()._backward_pre_hooks": "The same, before they are.",
    "torch.nn.modules.module._has_any_global_hook": (
        "Says whether anybody listens to every module there is. Without it as above."
    ),
    "torch.nn.Module()._non_persistent_buffers_set": (
        "Names the buffers that no checkpoint has, which a model made without memory computes "
        "anew. Without it every buffer missing in a state_dict would be looked up."
    ),
    "torch.nn.modules.transformer._get_seq_len": (
        "With the next one torch's own rule of what counts as a causal mask, so that a drop-in "
        "decides as torch does. Without them it would be written out here."
    ),
    "torch.nn.modules.transformer._detect_is_causal_mask": "See the one before.",
    "torch.nn.functional._get_softmax_dim": (
        "torch's own rule of the dimension where none is given, with its warning. Without it both "
        "would be written out here."
    ),
    "torch.empty(0)._version": (
        "Counts how often a tensor was written to, by which a model knows that its head has "
        "changed. Without it what was computed could not be held against what is there now."
    ),
    "torch._C._dynamo.guards._empty_strided_cuda": (
        "Allocates past PyTorch's dispatcher, as Inductor's code does. Without it "
        "torch.empty_strided would, for one microsecond more a tensor."
    ),
    "torch._C._dynamo.guards._empty_strided_cpu": (
        "The same where a launch is timed without a GPU. Without it that would cost what it does "
        "not cost on a GPU."
    ),
    "triton.compiler.CompiledKernel.run": (
        "With its neighbours `function` and `packed_metadata` what Triton's own launch ends in, "
        "and a remembered one is. Without them every launch would bind its arguments again."
    ),
    "triton.knobs.runtime.launch_enter_hook": (
        "Tells of profilers that ask to hear of launches, which Triton itself then does. Without "
        "it they would hear of first launches alone."
    ),
    "triton.knobs.runtime.interpret": (
        "Triton's own answer whether it interprets. Without it the environment would be read again."
    ),
    "triton.runtime.driver": (
        "Tells the architecture of a device, and its current stream. Without it the stream would "
        "be torch.cuda.current_stream's, for a microsecond, and shared memory a table's."
    ),
    "triton.runtime.driver._active": (
        "Is put back after a driver without a GPU has served. Without it Triton would keep that "
        "one, for it forgets none but by `reset_active`, which looks for a GPU."
    ),
    "triton.runtime.interpreter._convert_float": (
        "How Triton's interpreter rounds, which is replaced for checks. Without it results in "
        "bfloat16 would have twice the error that a GPU makes."
    ),
    "torch.nn.Module()._apply": (
        "Overridden, for tables of positions must not be rounded by `half()`. Without it they "
        "would be computed again at the next call."
    ),
    "torch.nn.Module()._save_to_state_dict": (
        "Overridden, so that a merged adapted layer saves the weight it had before. Without it "
        "hooks would do that."
    ),
    "torch.nn.Module()._load_from_state_dict": (
        "Overridden, so that what is loaded is not taken for merged. Without it likewise."
    ),
}
"""Python expressions that have a value where the name exists, each with its reason."""

OVERRIDDEN = ("_apply", "_save_to_state_dict", "_load_from_state_dict")
"""Methods of torch.nn.Module that modules define again, and call on `super()`."""


def missing_names() -> list[str]:
    """Those of `NAMES` that the installed versions have not; of Triton's none where it is not."""
    return [name for name in NAMES if not _exists(name)]


def _exists(name: str) -> bool:
    known: dict[str, Any] = {"torch": torch}
    if name.startswith("triton."):
        if importlib.util.find_spec("triton") is None:
            return True
        known["triton"] = importlib.import_module("triton")
        importlib.import_module("triton.runtime.interpreter")
    try:
        eval(name, known)
    except AttributeError:
        return False
    return True


def _function(name: str) -> Callable[..., Any]:
    """A function of torch's under its private name, or one that says that it is missing."""
    if _exists(name):
        return eval(name, {"torch": torch})

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"fastattn needs {name}, which torch {torch.__version__} does not have: "
            "see kernels/private.py"
        )

    return refuse


count_dispatch_modes = _function("torch._C._len_torch_dispatch_stack")
are_transforms_active = _function("torch._C._are_functorch_transforms_active")
allows_tf32 = _function("torch._C._get_cublas_allow_tf32")
dispatch_modes = _function("torch.utils._python_dispatch._get_current_dispatch_mode_stack")
softmax_dim = _function("torch.nn.functional._get_softmax_dim")
has_any_global_hook = _function("torch.nn.modules.module._has_any_global_hook")


def unseen_allocation(device_type: str) -> Callable[..., torch.Tensor]:
    """`empty_strided(shape, strides, dtype)` of a device, which no mode or subclass sees."""
    guards: Any = torch._C._dynamo.guards  # type: ignore[attr-defined]
    return guards._empty_strided_cpu if device_type == "cpu" else guards._empty_strided_cuda


def triton_driver() -> Any:
    """Triton's driver of the GPUs that there are."""
    import triton

    return triton.runtime.driver.active


@contextlib.contextmanager
def use_driver(driver: Any) -> Iterator[None]:
    """Give Triton another driver for the length of a `with` block."""
    import triton

    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver._active = previous


def is_interpreting() -> bool:
    """Whether Triton interprets kernels."""
    import triton

    return triton.knobs.runtime.interpret


def launch_hooks() -> Any:
    """What profilers ask Triton to call at each launch, a list under `calls`."""
    import triton

    return triton.knobs.runtime.launch_enter_hook


def launch_handle(compiled: Any) -> tuple[Callable, Any, Any, Callable[[int], Any]]:
    """What a launch of a compiled kernel takes: run, function, metadata, and what tells streams."""
    stream_of = triton_driver().get_current_stream
    return compiled.run, compiled.function, compiled.packed_metadata, stream_of


def is_in_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed."""
    return torch.autograd.forward_ad._current_level >= 0


def fix_backward(function: Any, backward: Callable[..., Any]) -> None:
    """Have backward passes of a Function call this, and look for nothing."""
    function._backward_cls.apply = backward


def run_while_tracing(function: AnyFunction) -> AnyFunction:
    """Have Dynamo run the decorated function and take its result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks of its own run when a module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_own_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks of its own run when a module is called, or when its gradients are computed."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_unsaved_buffers(module: torch.nn.Module) -> bool:
    """Whether a module has buffers that no state_dict has."""
    return bool(module._non_persistent_buffers_set)


def is_causal_mask(mask: torch.Tensor, x: torch.Tensor, batch_first: bool) -> bool:
    """Whether torch's transformer layers take a mask for the causal one."""
    length = transformer._get_seq_len(x, batch_first)
    return transformer._detect_is_causal_mask(mask, None, length)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to, as far as PyTorch counts that."""
    return tensor._version


def replace_float_conversion(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Give Triton's interpreter another conversion of floats, made from the one it has."""
    from triton.runtime import interpreter

    interpreter._convert_float = make(interpreter._convert_float)
