"""A mixture of experts: a small Mixtral learns a rule, and its experts share the work.

The loss that balances experts is made of what hooks on the routers keep. Run it with
`python docs/examples/experts.py`; it takes some ten seconds on a CPU.
"""

import torch

import fastattn
import fastattn.nn as nn
from fastattn.models.mixtral import MixtralConfig, MixtralForCausalLM

DIGITS, LENGTH, EXPERTS, CHOSEN = 10, 16, 4, 2
CONFIG = MixtralConfig(
    vocab_size=DIGITS,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_local_experts=EXPERTS,
    num_experts_per_tok=CHOSEN,
)


def draw(batch: int) -> torch.Tensor:
    """Tokens (B, LENGTH), each the sum of the two before it, modulo DIGITS."""
    tokens = torch.randint(DIGITS, (batch, 2))
    for _ in range(LENGTH - 2):
        tokens = torch.cat((tokens, tokens[:, -2:].sum(1, keepdim=True) % DIGITS), 1)
    return tokens


def main(steps: int = 300) -> tuple[float, float]:
    """Train, and return the accuracy on new sequences and the smallest share of an expert."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(CONFIG)
    routers = [module for module in model.modules() if isinstance(module, nn.TopKRouter)]
    seen = []  # What every router gives: weights, ids and logits of all tokens.
    for router in routers:
        router.register_forward_hook(lambda router, inputs, output: seen.append(output))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        seen.clear()
        tokens = draw(32)
        loss = model(tokens, labels=tokens).loss
        _, ids, logits = zip(*seen)
        balance = fastattn.load_balancing_loss(logits, ids, EXPERTS)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, balance {balance.item():.3f}")
    seen.clear()
    tokens = draw(256)
    with torch.no_grad():
        right = model(tokens).logits[:, 1:-1].argmax(-1) == tokens[:, 2:]
    smallest = 1.0
    for layer, (_, ids, _) in enumerate(seen):
        shares = torch.bincount(ids.flatten(), minlength=EXPERTS) / ids.numel()
        print(f"layer {layer}: experts have {[round(share, 2) for share in shares.tolist()]}")
        smallest = min(smallest, shares.min().item())
    return right.float().mean().item(), smallest


if __name__ == "__main__":
    print("right: {:.2f} of the tokens; least share of an expert: {:.2f}".format(*main()))
