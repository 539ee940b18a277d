"""What all models share: reading and writing checkpoints, initial values, checkpointed blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from ..kernels.private import has_unsaved_buffers
from ..nn import Experts, TopKRouter
from . import _checkpoint
from ._checkpoint import Checkpoint, CheckpointError
from ._config import Config
from ._experts import ExpertNames, Pieces, find_experts, join_experts
from ._quantized import plan_unpacking
from ._states import check_writable, choose_dtype, find_class, same_tensors

if TYPE_CHECKING:
    from typing_extensions import Self


class Model(nn.Module):
    """A model, or the part of one, whose parameters have the names and shapes of Hugging Face's.

    A family derives one class for the body (`LlamaModel`) and one for each head
    (`LlamaForCausalLM`), under the names that `architectures` in config.json has. Its `__init__`
    calls `super().__init__(config)`, makes the modules, and ends with `self.finish()`. A body's
    forward returns an `Output` with `last_hidden_state` and calls each block by `self.run(block,
    ...)`, which is what `gradient_checkpointing` switches. A head with logits of every token
    defines `head(features)`, and says by `head_layer` which layer that calls.

    A model is made on the meta device when a checkpoint is read into it. Buffers that no state_dict
    holds must therefore be written again in their module's `_apply`, as `fastattn.nn`'s do.

    Attributes:
        config: the configuration, whose class is `config_class`.
        gradient_checkpointing: whether each block forgets what is inside it after the forward, and
            computes it again in the backward. It holds for all parts of a model it is set on.
        base_prefix: the attribute under which a head has its body, as in transformers.
        tied: names of parameters that are the same tensor as another, by their name. A checkpoint
            lacks them. It counts where `is_tied()` says so.
        ignored: regular expressions for names in a checkpoint that are no parameters.
        renamed: regular expressions for parts of older names in a checkpoint, and what they are
            replaced by.
        head_layer: the name of the layer that maps features to logits, where there is one.
        written_apart: names that a checkpoint has as well where the weights in `tied` are not
            tied, by the parameter whose numbers they are there.
        kept_wide: regular expressions for names of what keeps its dtype when others are cast.
        expert_names: what checkpoints call the projections of single experts, where there are any.
        written_as: regular expressions for parts of names, and what a checkpoint has for them.
    """

    config_class: ClassVar[type[Config]]
    base_prefix: ClassVar[str] = ""
    tied: ClassVar[Mapping[str, str]] = {}
    ignored: ClassVar[Sequence[str]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    head_layer: ClassVar[str] = "lm_head"
    written_apart: ClassVar[Mapping[str, str]] = {}
    kept_wide: ClassVar[Sequence[str]] = ()
    expert_names: ClassVar[ExpertNames | None] = None
    written_as: ClassVar[Mapping[str, str]] = {}

    config: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        if type(config) is not self.config_class:
            raise TypeError(
                f"{type(self).__name__}: config must be a {self.config_class.__name__}, "
                f"got {type(config).__name__}"
            )
        self.config = config
        self._gradient_checkpointing = False

    def finish(self) -> None:
        """Draw the initial values and tie the weights; the last line of every `__init__`.

        Models within this one have done so already.
        """
        for child in self.children():
            if not isinstance(child, Model):
                child.apply(self.initialize)
        self.initialize(self)
        self.tie_weights()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, each by `initialize` of the innermost model that has it."""
        for child in self.children():
            if isinstance(child, Model):
                child.reset_parameters()
        self.finish()

    def initialize(self, module: nn.Module) -> None:
        """Draw the parameters of one module, without those of modules within it, as transformers.

        Linear layers, experts, routers and embeddings are normal with standard deviation
        `config.initializer_range`, biases and the row of the padding token are 0; norms keep what
        their constructors gave.
        """
        if isinstance(module, nn.Linear | nn.Embedding | TopKRouter):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            nn.init.normal_(module.down_proj, std=self.config.initializer_range)
            for bias in (module.gate_up_proj_bias, module.down_proj_bias):
                if bias is not None:
                    nn.init.zeros_(bias)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def is_tied(self) -> bool:
        """Whether the configuration wants the weights in `tied` to be tied."""
        return bool(self.tied) and self.config.tie_word_embeddings

    def tie_weights(self) -> None:
        """Make the parameters in `tied` the same objects, if the configuration wants that."""
        if self.is_tied():
            for name, source in self.tied.items():
                self._tie(name, source)

    def _tie(self, name: str, source: str) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self.get_submodule(owner), attribute, self.get_parameter(source))

    def head_tensors(self) -> list[torch.Tensor]:
        """What `head` reads of the model: the logits change with these."""
        layer = self.get_submodule(self.head_layer)
        return [*layer.parameters(), *layer.buffers()]

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        for module in self.modules():
            if isinstance(module, Model):
                module._gradient_checkpointing = wanted

    def run(self, block: nn.Module, *arguments: Any, **options: Any) -> Any:
        """block(*arguments, **options), computed again in the backward if that is wanted."""
        if self._gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False, **options)
        return block(*arguments, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        except_for: Sequence[str] = (),
        ignore: Sequence[str] = (),
    ) -> Self:
        """Read a model from a folder with config.json and safetensors, also sharded ones.

        Weights in fp8 with scales of blocks, and in mxfp4, become numbers of 16 or 32 bits.

        Args:
            folder: a local folder, as `save_pretrained` here or in transformers writes it.
            device: where the parameters go; torch's default device if None.
            dtype: what floating-point parameters are cast to, also as a string ("bfloat16"); None
                keeps what is stored, and makes of quantized weights what config.json says, or else
                bfloat16; "auto" takes what config.json says if it says it.
            except_for: names, or beginnings of them up to a dot, that need not match: parameters
                that the checkpoint may lack, which are then drawn, and tensors there that may have
                no place in the model. A reward model of a language model is
                `LlamaForSequenceClassification.from_pretrained(folder, except_for=["score",
                "lm_head"])`.
            ignore: names of keys of config.json that are not known here, and do not change what the
                model computes.

        Returns:
            The model, in evaluation mode.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: dtype is none that parameters can have.
            ConfigError: config.json is of another family, or asks for what is not supported.
            CheckpointError: a file is missing or damaged, or a parameter is missing, left over or
                of another shape. Nothing has been loaded then.
        """
        values = _checkpoint.read_config(folder)
        dtype = choose_dtype(dtype, values)
        values, unpack = plan_unpacking(values, ignore, dtype)
        config = cls.config_class.from_dict(values, ignore=ignore)
        stored = unpack(Checkpoint.open(folder))
        with torch.device("meta"):
            model = cls(config)
        wanted, pieces = model._match(stored, except_for)
        device = torch.get_default_device() if device is None else torch.device(device)
        state = stored.read(wanted, device, dtype)
        kept = {t: n for t, n in wanted.items() if any(re.search(p, n) for p in model.kept_wide)}
        state |= stored.read(kept, device, None)
        state |= join_experts(model, pieces, lambda names: stored.read(names, device, dtype))
        model = model._fill(state, device, dtype)
        for name, source in stored.same.items():
            if name in state and source in state and torch.equal(state[name], state[source]):
                model._tie(name, source)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write config.json and model.safetensors into a folder, as transformers reads them.

        Parameters that are one tensor are so again when `from_pretrained` here has read them. Those
        that the configuration may tie are stored once, and config.json says that they are tied;
        where they are not one tensor, it says that they are not.

        Args:
            folder: where to.
            state_dict: the parameters, where the model does not have them whole, as under FSDP2:
                what `torch.distributed.checkpoint.state_dict.get_model_state_dict(model,
                options=StateDictOptions(full_state_dict=True, cpu_offload=True))` gives.

        Raises:
            ImportError: safetensors is not installed.
            OSError: a file cannot be written; those that were there are as they were.
            ValueError: parameters are sharded, or not those of a model of this configuration.
        """
        state = dict(self.state_dict() if state_dict is None else state_dict)
        check_writable(self, state)
        same = same_tensors(self)
        config = self.config.to_dict()
        if self.tied:
            tied = all(same.get(name, name) == same.get(s, s) for name, s in self.tied.items())
            config["tie_word_embeddings"] = tied
            if tied:
                state = {name: tensor for name, tensor in state.items() if name not in self.tied}
            else:
                state |= {name: state[source] for name, source in self.written_apart.items()}
        config["architectures"] = [find_class(self).__name__]
        config["dtype"] = str(next(self.parameters()).dtype).removeprefix("torch.")
        same = {name: source for name, source in same.items() if {name, source} <= state.keys()}
        if self.expert_names is not None:
            state = self.expert_names.split(state)
        for pattern, replacement in self.written_as.items():
            state = {re.sub(pattern, replacement, name): x for name, x in state.items()}
        _checkpoint.write(folder, config, state, same)

    def _match(
        self, stored: Checkpoint, except_for: Sequence[str]
    ) -> tuple[dict[str, str], dict[str, Pieces]]:
        """The parameter that each tensor of a checkpoint is for, after everything was checked.

        And the pieces of each parameter of experts that the checkpoint has singly.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        names = {
            name: self._own_name(name, stored)
            for name in stored.files
            if not any(re.search(pattern, name) for pattern in self.ignored)
        }
        tied = self._pair_tied_names()
        except_for = [except_for] if isinstance(except_for, str) else except_for

        def is_excepted(name: str) -> bool:
            return any(name == start or name.startswith(f"{start}.") for start in except_for)

        pieces, incomplete, misshapen = find_experts(self, names, own, stored.shapes)
        singles = {theirs for parts in pieces.values() for theirs in parts.values()}
        names = {theirs: name for theirs, name in names.items() if theirs not in singles}
        placed = {theirs: name for theirs, name in names.items() if name in own}
        extra = [t for t, name in names.items() if name not in own and not is_excepted(name)]
        present = {*placed.values(), *pieces}
        missing = [
            n for n in own if n not in present and tied.get(n) not in present and not is_excepted(n)
        ]
        shapes = [
            f"{name} is {stored.shapes[theirs]} there and {own[name]} in the model"
            for theirs, name in placed.items()
            if stored.shapes[theirs] != own[name]
        ]
        shapes += misshapen
        stored.refuse(
            type(self).__name__,
            {
                "parameters that it lacks": missing,
                "experts that it lacks or has in vain": incomplete,
                "tensors that are no parameters of the model": extra,
                "other shapes": shapes,
            },
        )
        return placed, pieces

    def _own_name(self, name: str, stored: Checkpoint) -> str:
        """A checkpoint's name as the model has it, for bodies and for heads, and older ones."""
        for pattern, replacement in self.renamed.items():
            name = re.sub(pattern, replacement, name)
        prefix = f"{self.base_prefix}."
        has_body = self._has(self.base_prefix)
        from_head = any(theirs.startswith(prefix) for theirs in stored.files)
        if self.base_prefix and has_body and not from_head:
            # Saved from a body alone, as the first checkpoints of GPT-2 are.
            top = name.partition(".")[0]
            return name if self._has(top) else prefix + name
        if self.base_prefix and not has_body and from_head:
            return name.removeprefix(prefix)
        return name

    def _has(self, name: str) -> bool:
        """Whether a part of the model has this name."""
        return isinstance(getattr(self, name, None), nn.Module)

    def _pair_tied_names(self) -> dict[str, str]:
        """Of each tied parameter the other name; a checkpoint may have either."""
        tied = self.tied if self.is_tied() else {}
        return {**tied, **{source: name for name, source in tied.items()}}

    def _fill(
        self, state: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype | None
    ) -> Self:
        """A model that is on the meta device, with a checkpoint's tensors as its parameters."""
        for name, other in self._pair_tied_names().items():
            tensor = state.get(name)
            if tensor is None:
                continue
            twin = state.setdefault(other, tensor)
            if twin is not tensor and not torch.equal(twin, tensor):
                raise CheckpointError(
                    f"{name} and {other} are tied by the configuration and differ in the checkpoint"
                )
        if dtype is None:
            dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        drawn = {name.rpartition(".")[0] for name in self.state_dict() if name not in state}
        for name, module in self.named_modules():
            if has_unsaved_buffers(module) or name in drawn:
                module.to_empty(device=device, recurse=False)
            if name in drawn:
                module.reset_parameters()  # type: ignore[operator]
                self.initialize(module.to(dtype))
        # What is to be loaded and what is drawn has been settled by `_match`.
        self.load_state_dict(state, strict=False, assign=True)
        self.tie_weights()
        return self
