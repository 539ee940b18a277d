"""The loss of a language model without its logits.

transformers' models compute `logits = self.lm_head(hidden)`, cap or scale them at most, and call
`self.loss_function(logits, labels, ...)`. In a call with labels the head of a patched model returns
`DeferredLogits`, and its loss function computes `fastattn.linear_cross_entropy` of what these
remember. Nothing of a model's forward is copied, and whatever else it or its caller does with the
logits computes them. Without gradients, as in evaluation, they are computed at once.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ... import ops
from ...nn.hooks import has_hooks
from ...nn.mlp import are_readable
from ...patching import Finder, Rule, make_twin, plain_class
from .logits import DeferredLogits
from .private import LOSS_ATTRIBUTE, is_replica


class DeferringHead(nn.Module):
    """A head that returns `DeferredLogits` while its model asks for that."""

    _fastattn_defers: bool
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> Any:
        """(B, S, D) to (B, S, vocabulary)."""
        if self._fastattn_defers and input.dtype is not torch.float64:
            return DeferredLogits(input, self.weight, self.bias)
        return super().forward(input)


class DeferringModel(nn.Module):
    """A language model that needs no logits for its loss."""

    _fastattn_labels: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class computes; `logits` are `DeferredLogits` where a loss has gradients."""
        place = self._fastattn_labels
        labels = args[place] if len(args) > place else kwargs.get("labels")
        head = self.get_output_embeddings()  # type: ignore[operator]
        if labels is None or not torch.is_grad_enabled() or not _may_defer(self, head):
            return super().forward(*args, **kwargs)
        head._fastattn_defers = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            head._fastattn_defers = False


def causal_lm_loss(
    logits: Any,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss`, which for `DeferredLogits` needs no logits.

    Args:
        logits: (B, S, vocab_size), of tokens before those that `labels` has there.
        labels: (B, S), or None with shift_labels.
        vocab_size: the number of classes.
        num_items_in_batch: what the sum is divided by; None for the mean.
        ignore_index: the label of tokens that do not count.
        shift_labels: (B, S), labels that are shifted already.
        kwargs: ignored, as there.

    Returns:
        The loss in float32.
    """
    if isinstance(logits, DeferredLogits):
        known = find_scale_and_softcap(logits)
        target = _shifted(labels, ignore_index) if shift_labels is None else shift_labels
        rows = logits.hidden.flatten(0, -2)
        fits = target.numel() == len(rows) and vocab_size == len(logits.weight)
        if known is not None and fits:
            # float32 rows under autocast: products in 16 bits, and the loss is not rounded to them.
            narrow = logits.product_dtype.itemsize == 2
            with torch.autocast(rows.device.type, logits.product_dtype, enabled=narrow):
                loss = ops.linear_cross_entropy(
                    rows.float() if narrow else rows,
                    logits.weight,
                    target.reshape(-1).to(rows.device),
                    logits.bias,
                    ignore_index=ignore_index,
                    reduction="mean" if num_items_in_batch is None else "sum",
                    logit_scale=known[0],
                    softcap=known[1],
                )
            if num_items_in_batch is None:
                return loss
            if isinstance(num_items_in_batch, torch.Tensor):
                num_items_in_batch = num_items_in_batch.to(loss.device)
            return loss / num_items_in_batch
        logits = logits.compute()
    return ForCausalLMLoss(
        logits,
        labels,
        vocab_size,
        num_items_in_batch=num_items_in_batch,  # type: ignore[arg-type]  # an int serves there too
        ignore_index=ignore_index,
        shift_labels=shift_labels,
        **kwargs,
    )


def find_scale_and_softcap(logits: DeferredLogits) -> tuple[float, float | None] | None:
    """The `logit_scale` and the `softcap` that the steps are, or None where they are neither."""
    steps = [step for step in logits.steps if step[0] != "float"]
    scale = 1.0
    while steps:
        names, numbers = zip(*steps, strict=True)
        if names == ("divide", "tanh", "multiply") and numbers[0] == numbers[2]:
            return scale, float(numbers[0])
        if names[0] == "tanh" or not NARROWEST <= numbers[0] <= 1.0 / NARROWEST:
            return None
        scale = scale * numbers[0] if names[0] == "multiply" else scale / numbers[0]
        del steps[0]
    return scale, None


NARROWEST = 2.0**-60
"""The least number that logits are scaled by without the loss; the largest is one divided by it."""


def loss_finder(model: nn.Module) -> Finder:
    """Finds the language models in a model, and their heads."""
    heads: dict[nn.Module, str | None] = {}
    owners: dict[nn.Module, str | None] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _calls_loss_function(module):
            head = module.get_output_embeddings()
            if head is not None:
                owners[module] = _objection(module, head)
                heads[head] = owners[module]

    def find(module: nn.Module, kind: type[nn.Module]) -> Rule | str | None:
        if module in owners:
            reason = owners[module]
            return reason or Rule(kind, make_twin(kind, DeferringModel), _of_owner)
        if heads.get(module, "") is None:
            return Rule(kind, make_twin(kind, DeferringHead), _of_head)
        return None

    return find


def _shifted(labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    if labels is None:
        raise ValueError("causal_lm_loss: labels or shift_labels must be given")
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _may_defer(model: nn.Module, head: Any) -> bool:
    """Whether calling the head would do no more than its product, here and now."""
    return (
        isinstance(head, DeferringHead)
        and "forward" not in vars(head)
        and not has_hooks(head)
        and are_readable(head.weight, head.bias)
        # torch.nn.DataParallel gathers outputs, and knows tensors alone.
        and not is_replica(model)
    )


def _calls_loss_function(model: PreTrainedModel) -> bool:
    forward = inspect.unwrap(type(model).forward)
    code = getattr(forward, "__code__", None)
    return (
        code is not None
        and "loss_function" in code.co_names
        and "labels" in inspect.signature(type(model).forward).parameters
    )


def _objection(model: PreTrainedModel, head: nn.Module) -> str | None:
    """Why the loss of a model is left to it."""
    if type(plain_class(model)) is not type:
        return "its class has a metaclass"
    if plain_class(head) is not nn.Linear:
        return f"its logits are kept, for its head is a {type(head).__name__}"
    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
        return f"its logits are kept, for its loss function is {name}"
    return None


def _of_owner(model: nn.Module) -> Mapping[str, Any]:
    parameters = list(inspect.signature(type(model).forward).parameters)
    # The first is self, which is not among a call's arguments.
    return {LOSS_ATTRIBUTE: causal_lm_loss, "_fastattn_labels": parameters.index("labels") - 1}


def _of_head(_: nn.Module) -> Mapping[str, Any]:
    return {"_fastattn_defers": False}
