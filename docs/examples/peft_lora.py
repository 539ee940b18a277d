"""PEFT's LoRA around a patched model: a Llama that counts up learns by adapters to count down.

Run it with `python docs/examples/peft_lora.py`; it takes some twenty seconds on a CPU.
"""

import peft
import torch
import transformers

import fastattn

NUMBERS, LENGTH = 16, 10
CONFIG = transformers.LlamaConfig(
    vocab_size=NUMBERS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def draw(batch: int, by: int) -> torch.Tensor:
    """Tokens (B, LENGTH), each more by `by` than the one before it, modulo NUMBERS."""
    return (torch.randint(NUMBERS, (batch, 1)) + by * torch.arange(LENGTH)) % NUMBERS


def train(model: torch.nn.Module, steps: int, lr: float, by: int) -> None:
    """Train the parameters that ask for gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr)
    for _ in range(steps):
        tokens = draw(32, by)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, by: int) -> float:
    """The share of right next tokens."""
    tokens = draw(128, by)
    return (model(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]).float().mean().item()


def main(steps: int = 80) -> float:
    """Teach counting up, then down by adapters, and return the accuracy of the merged model."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    fastattn.patch(model)  # Before the adapters, or after them: both work.
    train(model, steps, 3e-3, by=1)
    print(f"counts up {accuracy(model, 1):.2f}, down {accuracy(model, -1):.2f}")
    adapters = peft.LoraConfig(r=8, target_modules="all-linear")
    adapted = peft.get_peft_model(model, adapters)
    adapted.print_trainable_parameters()
    train(adapted, steps, 1e-2, by=-1)
    with adapted.disable_adapter():
        print(f"counts up {accuracy(adapted, 1):.2f} without the adapters")
    return accuracy(adapted.merge_and_unload(), -1)


if __name__ == "__main__":
    print(f"counts down {main():.2f}")
