"""Attention of Hugging Face's models by one name: `attn_implementation="fastattn"`.

    import fastattn.integrations.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")

`from_config`, `model.set_attn_implementation` and a dictionary of names for a model's parts take
the name too. Importing this module registers it, which changes nothing in models that do not ask
for it. `fastattn.patch(model)` replaces norms, feed-forward layers and the loss as well, and needs
no import; `AutoModelForCausalLM`, which `fastattn` offers too, does both in one line.

Experts have the same name: `experts_implementation="fastattn"`, or
`model.set_experts_implementation("fastattn")`.
"""

from .attention import attention_forward as attention_forward
from .auto import AutoModelForCausalLM as AutoModelForCausalLM
from .compact import CompactMask as CompactMask
from .experts import experts_forward as experts_forward
from .masks import attention_mask as attention_mask
from .names import BATCHING_NAME as BATCHING_NAME
from .names import NAME as NAME
from .names import PACKING_NAME as PACKING_NAME
from .names import register as register

__all__ = [
    "BATCHING_NAME",
    "NAME",
    "PACKING_NAME",
    "AutoModelForCausalLM",
    "CompactMask",
    "attention_forward",
    "attention_mask",
    "experts_forward",
    "register",
]

register()
