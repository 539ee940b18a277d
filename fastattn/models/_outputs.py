"""What models return."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..kernels.private import version_of

# Its version counts the steps of all optimizers. A number would be a constant to torch.compile,
# and a model compiled anew at every step.
with torch.inference_mode(False):
    _steps = torch.zeros((), device="cpu")

_last_steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""The last step of each optimizer."""


def _count_step(optimizer: Any, *_: Any) -> None:
    # A compiled step changes parameters by operations that all count in their versions.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(_steps)
        _last_steps[optimizer] = version_of(_steps)


# Fused optimizers, and those that write to `parameter.data`, leave parameters' versions alone.
register_optimizer_step_post_hook(_count_step)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    # torch.compile of PyTorch 2.10 does not trace the call.
    return torch.amp.is_autocast_available(device)


class Moment:
    """What a head's numbers depend on beside its input, as it is when this is made.

    Args:
        head: the model with the head. What its `head_tensors` gives is watched.
        features: what the head is to be applied to.
    """

    def __init__(self, head: Any, features: torch.Tensor) -> None:
        self.device = features.device.type
        self.autocast = None
        if _has_autocast(self.device):
            enabled = torch.is_autocast_enabled(self.device)
            self.autocast = (enabled, torch.get_autocast_dtype(self.device))
        self.tensors: Sequence[torch.Tensor] = _get_tensors(head)
        self.versions = [_version(tensor) for tensor in self.tensors]
        self.steps = version_of(_steps)

    def logits(self, head: Any, features: torch.Tensor) -> torch.Tensor:
        """head.head(features) as it would have been then.

        Raises:
            RuntimeError: the head is another one by now.
        """
        self._check(_get_tensors(head))
        with contextlib.ExitStack() as then:
            if self.autocast is not None:
                enabled, dtype = self.autocast
                then.enter_context(torch.autocast(self.device, dtype=dtype, enabled=enabled))
            if features.is_inference():
                then.enter_context(torch.inference_mode())
            return head.head(features)

    def _check(self, tensors: Sequence[torch.Tensor]) -> None:
        plain = (torch.Tensor, torch.nn.Parameter)
        sharded = any(type(tensor) not in plain for tensor in tensors)
        if sharded and all(type(tensor) in plain for tensor in self.tensors):
            raise RuntimeError(
                "logits: the head's weight has been sharded again since the model was called; ask "
                "for logits before the backward (and under reshard_after_forward=False), or call "
                "the model without labels"
            )
        changed = len(tensors) != len(self.tensors) or any(
            now is not then or _version(now) != version
            for now, then, version in zip(tensors, self.tensors, self.versions, strict=True)
        )
        if changed or self._has_stepped():
            raise RuntimeError(
                "logits: the head has changed since the model was called with labels, and what it "
                "gives now is not what the loss came from; ask for logits before optimizer.step(), "
                "or call the model without labels"
            )

    def _has_stepped(self) -> bool:
        """Whether an optimizer that has one of the tensors has made a step since then."""
        watched = {id(tensor) for tensor in self.tensors if tensor.requires_grad}
        return any(
            step > self.steps and any(id(p) in watched for group in groups for p in group["params"])
            for groups, step in [(o.param_groups, step) for o, step in _last_steps.items()]
        )


def _get_tensors(head: Any) -> Sequence[torch.Tensor]:
    watched = getattr(head, "head_tensors", None)
    return () if watched is None else watched()


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to, as far as PyTorch counts that."""
    # Dynamo knows the version and not the question, whose answer is no for what it compiles.
    inference = not torch.compiler.is_compiling() and tensor.is_inference()
    return 0 if inference else version_of(tensor)


@dataclass
class Output:
    """The result of a model, with the names of transformers' outputs.

    It may be read as theirs, too: `output["loss"]`, `output[0]`, `"loss" in output`, `keys()`,
    `items()` and `to_tuple()`. The keys are those that are there: of a model with a head loss and
    logits, of one without last_hidden_state and pooler_output, and of both
    encoder_last_hidden_state. Logits are computed when they are read, and not when keys are.

    Attributes:
        loss: a float32 scalar (float64 of a model in float64) where labels were given, else None.
            It comes from the last hidden states without the logits of all tokens ever existing.
        last_hidden_state: (B, S, C), of the decoder where there are an encoder and a decoder.
        encoder_last_hidden_state: (B, S, C) of the encoder where there is one, else None.
        pooled: what a head pools of the hidden states, as BERT's `pooler_output`, or None.
        computed: the logits if the model computed them; read `logits`.
        head: the model whose `head(features)` maps `features` to logits, or None.
        features: what the head is applied to; last_hidden_state if None.
        moment: what else the logits depend on, as it is when this is made.
    """

    loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    computed: torch.Tensor | None = field(default=None, repr=False)
    head: Any = field(default=None, repr=False)
    features: torch.Tensor | None = field(default=None, repr=False)
    moment: Moment | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        features = self._features()
        if self.head is not None and self.moment is None and features is not None:
            self.moment = Moment(self.head, features)

    def _features(self) -> torch.Tensor | None:
        return self.last_hidden_state if self.features is None else self.features

    @property
    def logits(self) -> torch.Tensor:
        """The logits: of the model's call without labels, else computed when first asked for.

        Asked for after a call with labels, they are (B, S, V) numbers that the loss did without.
        They are computed as they would have been in that call, under its autocast, and have
        gradients if the hidden states have.

        Raises:
            AttributeError: the model has no head.
            RuntimeError: the head is no longer what it was in that call, as after a step of an
                optimizer that trains it, or where FSDP2 has sharded it again.
        """
        if self.computed is None:
            features = self._features()
            if self.head is None or features is None or self.moment is None:
                raise AttributeError("this model has no head, and so no logits")
            self.computed = self.moment.logits(self.head, features)
        return self.computed

    def keys(self) -> list[str]:
        """The names of what is there, in the order that `output[0]` and `to_tuple` count by."""
        has_logits = self.computed is not None or self.head is not None
        own = ("logits",) if has_logits else ("last_hidden_state", "pooler_output")
        rest = [*own, "encoder_last_hidden_state"]
        # Asking whether there are logits would compute them.
        there = [name for name in rest if name == "logits" or getattr(self, name) is not None]
        return there if self.loss is None else ["loss", *there]

    def items(self) -> list[tuple[str, torch.Tensor]]:
        """Pairs of a name and its tensor; the logits are computed."""
        return [(name, self[name]) for name in self.keys()]

    def to_tuple(self) -> tuple[torch.Tensor, ...]:
        """The tensors without their names; the logits are computed."""
        return self[:]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, key: Any) -> Any:
        names = self.keys()
        if isinstance(key, slice):
            return tuple(getattr(self, name) for name in names[key])
        if isinstance(key, int):
            return getattr(self, names[key])
        if key not in names:
            raise KeyError(f"{key!r} is none of {', '.join(names)}")
        return getattr(self, key)

    @property
    def pooler_output(self) -> torch.Tensor | None:
        """`pooled` under transformers' name."""
        return self.pooled
