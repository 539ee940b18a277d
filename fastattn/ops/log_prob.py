"""Log-probabilities of the classes that targets name, with entropies and hits, from logits."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..reference import log_prob as reference
from .core.apply import call
from .core.arguments import read_softcap
from .core.backends import use_triton
from .core.catalog import operation
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.registration import kernel_op
from .core.sharding import rowwise
from .cross_entropy_arguments import check_range
from .log_prob_arguments import LogProbOptions, check_log_prob, check_log_prob_options
from .log_prob_samples import SAMPLES

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..kernels import log_prob as kernels
else:
    kernels = lazy_module("fastattn.kernels.log_prob")


@kernel_op(kernels.log_prob_forward, sharding=rowwise(rows_in=(0, 1), rows_out=(0, 1, 2, 3, 4)))
def log_prob_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    with_entropy: int,
    with_correct: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(log_prob, entropy, correct, lse, its error) of rows, see kernels/log_prob.py."""
    computed = torch.promote_types(logits.dtype, torch.float32)
    leading = logits.shape[:-1]
    return (
        logits.new_empty(leading, dtype=computed),
        logits.new_empty(leading, dtype=computed) if with_entropy else None,
        logits.new_empty(leading, dtype=torch.bool) if with_correct else None,
        logits.new_empty(leading, dtype=computed),
        logits.new_empty(leading, dtype=computed),
    )


@kernel_op(
    kernels.log_prob_backward, sharding=rowwise(rows_in=(2, 0, 1, 3, 4, 5, 6), rows_out=(0,))
)
def log_prob_backward(
    dlog_prob: torch.Tensor,
    dentropy: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_error: torch.Tensor,
    entropy: torch.Tensor | None,
    ignore_index: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
) -> torch.Tensor:
    """dlogits, see log_prob_backward in kernels/log_prob.py."""
    return logits.new_empty(logits.shape)


class LogProbFunction(torch.autograd.Function):
    """(log_prob, entropy, correct, lse, lse_error), the first two differentiable in logits.

    `settings` are logit_scale, temperature and softcap.
    """

    returned = 3

    @staticmethod
    def forward(
        logits: torch.Tensor,
        target: torch.Tensor,
        ignore_index: int,
        with_entropy: int,
        with_correct: int,
        settings: tuple,
    ) -> tuple:
        return log_prob_forward(logits, target, ignore_index, with_entropy, with_correct, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        logits, target, ignore_index, _, _, settings = inputs
        _, entropy, *constant = output
        ctx.settings = (ignore_index, *settings)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in constant if o is not None))
        ctx.save_for_backward(logits, target, *constant[1:], entropy)

    @staticmethod
    def backward(
        ctx: Any, dlog_prob: torch.Tensor | None, dentropy: torch.Tensor | None, *_: None
    ) -> tuple:
        if dlog_prob is None and dentropy is None:
            return (None,) * 6
        logits, target, lse, lse_error, entropy = ctx.saved_tensors
        if dlog_prob is None:
            dlog_prob = torch.zeros_like(lse)
        # The saved entropy is an output, whose history must not be walked.
        entropy = None if entropy is None else entropy.detach()
        tensors = (dlog_prob, dentropy, logits, target, lse, lse_error, entropy)
        dlogits = gradients(log_prob_backward, _backward_formula, tensors, ctx.settings)
        return dlogits, *(None,) * 5


def _backward_formula(
    dlog_prob: torch.Tensor,
    dentropy: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_error: torch.Tensor,
    entropy: torch.Tensor | None,
    ignore_index: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
) -> torch.Tensor:
    """What log_prob_backward computes, in PyTorch; what is saved is a function of logits here."""

    def outputs(logits: torch.Tensor) -> Any:
        return reference.log_prob(
            logits,
            target,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            return_entropy=dentropy is not None,
        )

    _, pullback, *_ = torch.func.vjp(outputs, logits.to(lse.dtype))
    (dlogits,) = pullback(dlog_prob if dentropy is None else (dlog_prob, dentropy))
    return dlogits.to(logits.dtype)


@overload
def log_prob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_entropy: Literal[False] = False,
    return_correct: Literal[False] = False,
    **options: "Unpack[LogProbOptions]",
) -> torch.Tensor: ...
@overload
def log_prob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_entropy: Literal[True],
    return_correct: Literal[False] = False,
    **options: "Unpack[LogProbOptions]",
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def log_prob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_entropy: Literal[True],
    return_correct: Literal[True],
    **options: "Unpack[LogProbOptions]",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
@overload
def log_prob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_entropy: Literal[False] = False,
    return_correct: Literal[True],
    **options: "Unpack[LogProbOptions]",
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def log_prob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_entropy: bool = False,
    return_correct: bool = False,
    **options: "Unpack[LogProbOptions]",
) -> torch.Tensor | tuple[torch.Tensor, ...]: ...
@operation(reference=reference.log_prob, samples=SAMPLES)
def log_prob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_correct: bool = False,
) -> Any:
    """The log-probability of each row's target, in float32, from one read of the logits.

    With z the logits times `logit_scale`, capped, divided by `temperature`, in this order, and p =
    softmax(z): log(p) of the target, the entropy -sum(p log(p)), whose gradient goes where the
    log-probability's goes, and whether the target is what greedy decoding would take. All is
    computed in float32 (float64 for float64) whatever the dtype of the logits; autocast does not
    change it. The logits are read once forward and once backward.

    Rows whose target is `ignore_index` have log-probability and entropy 0, are not correct, and
    have gradient 0, whatever their logits hold: NaN and infinity, too, reach nothing. They take as
    long as others do. A target that is no class raises where that can be seen without waiting, on
    the reference backend on a CPU; the kernels make the log-probability and the gradient of its row
    NaN, and touch no memory outside.

    Args:
        logits: (..., V), float16, bfloat16, float32 or float64, V at least 1. Any strides; rows
            with a unit last stride at one common distance are read in place, others are copied.
        target: (...), int64 class indices.
        temperature: a positive number that the capped logits are divided by.
        softcap: a positive number; the scaled logits become softcap * tanh(logits / softcap).
            Infinity is no cap.
        logit_scale: a positive number that the logits are multiplied by first.
        ignore_index: the target of rows that do not count.
        return_entropy: return the entropy as well.
        return_correct: return as well whether the target is the first of the largest logits; where
            one is NaN it is not.

    Returns:
        log_prob (...) in float32 (float64 for float64), or a tuple of it and of what is asked for:
        entropy (...) of that dtype, correct (...) of bools. The first two are any number of times
        differentiable in the logits.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Example:
        kept = fastattn.log_prob(logits[:, :-1], tokens[:, 1:], temperature=0.7)

    Source: the policies of Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
        (2019); the entropy's bonus of Mnih et al., "Asynchronous Methods for Deep Reinforcement
        Learning" (2016).

    Example:
        >>> fastattn.log_prob(torch.zeros(2, 4), torch.tensor([1, 3])).exp().tolist()
        [0.25, 0.25]
    """
    check_log_prob(logits, target)
    check_log_prob_options("log_prob", temperature, softcap, logit_scale)
    if not use_triton(logits):
        check_range("log_prob", target, logits.shape[-1], ignore_index)
        return reference.log_prob(
            logits,
            target,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
            return_correct=return_correct,
        )
    softcap = read_softcap("log_prob", softcap, logits.dtype)
    settings = (float(logit_scale), float(temperature), softcap)
    wanted = (int(return_entropy), int(return_correct))
    outputs = call(LogProbFunction, logits, target, ignore_index, *wanted, settings)[:3]
    return select_outputs(outputs, return_entropy, return_correct)


def select_outputs(outputs: Any, return_entropy: bool, return_correct: bool) -> Any:
    """Of (log_prob, entropy, correct) what the caller asked for."""
    if not return_entropy and not return_correct:
        return outputs[0]
    wanted = (True, return_entropy, return_correct)
    return tuple(o for o, is_wanted in zip(outputs, wanted, strict=True) if is_wanted)
