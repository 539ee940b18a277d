"""A language model from a checkpoint, patched as it is loaded."""

from typing import Any

import transformers

from ...patching import patch


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """`transformers.AutoModelForCausalLM` whose models are patched: see `fastattn.patch`.

        model = fastattn.AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")

    The model is of the class that transformers has for it, and saves as such; `fastattn.unpatch`
    makes it theirs again. An `attn_implementation` that is given is kept.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """What transformers' own loads, patched; it takes the same arguments."""
        model = super().from_pretrained(*args, **kwargs)
        patch(model, attention=kwargs.get("attn_implementation") is None)
        return model

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """What transformers' own makes, with random weights, patched."""
        model = super().from_config(config, **kwargs)
        patch(model, attention=kwargs.get("attn_implementation") is None)
        return model
