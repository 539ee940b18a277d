"""What a configuration of a model holds, and how it is read from and written to config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

# Keys of Hugging Face's config.json that change nothing of what a model computes: where it comes
# from, which program wrote it, how text is generated with it, and what its outputs are to hold.
HARMLESS_NAMES = """
architectures assistant_confidence_threshold attn_implementation auto_map bad_words_ids
begin_suppress_tokens bos_token_id cache_config cache_implementation chunk_size_feed_forward
cls_token_id decoder_start_token_id diversity_penalty do_sample dola_layers dtype early_stopping
encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
exponential_decay_length_penalty finetuning_task force_words_ids forced_bos_token_id
forced_decoder_ids forced_eos_token_id generation_config gradient_checkpointing guidance_scale
id2label is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty
low_memory mask_token_id max_length max_new_tokens max_time min_length min_new_tokens min_p
model_max_length model_type no_repeat_ngram_size num_assistant_tokens
num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_logits output_past output_scores pad_token_id penalty_alpha prefix
prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
repetition_penalty return_dict return_dict_in_generate sentence_transformers sep_token_id
sequence_bias stop_strings suppress_tokens task_specific_params temperature token_healing
tokenizer_class tokenizer_model_max_length tokenizer_padding_side top_h top_k top_p torch_dtype
torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
unsloth_version use_bfloat16 use_cache
"""
HARMLESS = frozenset(HARMLESS_NAMES.split())


class ConfigError(ValueError):
    """A configuration that the models here cannot honour; the message names what is in the way."""


@dataclass(kw_only=True)
class Config:
    """What all families' configurations have. The names of all fields are Hugging Face's.

    A family derives a dataclass with `@dataclass(kw_only=True)`, sets `model_type`, and adds its
    fields. What follows from them, and values that are not supported, belong into `__post_init__`,
    which calls `super().__post_init__()`; `supports` checks a value there. A key of config.json
    that is no field is kept in `extra` for the way back if it is known to be harmless (`HARMLESS`,
    the family's own `harmless`, or a name that begins with "_"), or if its value switches nothing
    on (None, False, 0, or empty); any other is an error, because it may change what the model
    computes, unless the reader is told to ignore it by name.

    Attributes:
        num_labels: the classes of a classification head; 1 is a reward or a regression.
        problem_type: the loss of that head: "regression", "single_label_classification",
            "multi_label_classification", or None to see from the labels.
        extra: harmless keys of the config.json that it was read from.
    """

    model_type: ClassVar[str]
    harmless: ClassVar[frozenset[str]] = frozenset()

    num_labels: int = 2
    problem_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems = (
            None,
            "regression",
            "single_label_classification",
            "multi_label_classification",
        )
        self.supports("problem_type", *problems)

    def supports(self, name: str, *values: Any) -> None:
        """Raise ConfigError unless the field `name` has one of the values."""
        if getattr(self, name) not in values:
            allowed = ", ".join(map(repr, values))
            raise ConfigError(
                f"{type(self).__name__}: {name} must be one of {allowed}, "
                f"got {getattr(self, name)!r}"
            )

    @classmethod
    def modernize(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The content of a config.json with older names replaced by those of the fields."""
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, ignore: Sequence[str] = ()) -> Self:
        """Make a configuration of the content of a config.json.

        Args:
            values: what is in it.
            ignore: names of further keys that are known to change nothing of what is computed.

        Raises:
            ConfigError: it is one of another family, or has a key or a value that may change what
                the model computes and that is not supported.
        """
        given = dict(values)
        found = given.pop("model_type", cls.model_type)
        if found != cls.model_type:
            raise ConfigError(
                f"{cls.__name__}: this is the configuration of a model of type {found!r}, "
                f"not {cls.model_type!r}"
            )
        if given.get("id2label"):
            given.setdefault("num_labels", len(given["id2label"]))
        given = cls.modernize(given)
        names = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        known = {name: value for name, value in given.items() if name in names}
        extra = {name: value for name, value in given.items() if name not in names}
        ignored = {ignore} if isinstance(ignore, str) else set(ignore)
        if ignored & names:
            raise ConfigError(
                f"{cls.__name__}: {', '.join(sorted(ignored & names))} cannot be ignored, for the "
                "model depends on it"
            )
        unknown = [
            name
            for name in sorted(extra)
            if name not in ignored and not cls._is_harmless(name, extra[name])
        ]
        if unknown:
            shown = ", ".join(f"{name}={extra[name]!r}" for name in unknown)
            raise ConfigError(
                f"{cls.__name__}: not supported, and it may change what the model computes: "
                f"{shown}. If you know that it does not: from_pretrained(..., ignore={unknown})"
            )
        return cls(**known, extra=extra)

    @classmethod
    def _is_harmless(cls, name: str, value: Any) -> bool:
        return name.startswith("_") or name in HARMLESS | cls.harmless or not value

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers reads."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("extra", "num_labels")
        }
        names = self.extra.get("id2label") or {}
        if len(names) != self.num_labels:
            names = {str(label): f"LABEL_{label}" for label in range(self.num_labels)}
        labels = {
            "id2label": dict(names),
            "label2id": {name: int(label) for label, name in names.items()},
        }
        return {**self.extra, **fields, **labels, "model_type": self.model_type}
