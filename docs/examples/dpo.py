"""Direct preference optimisation: a small Llama learns to prefer answers that repeat the prompt.

Chosen and rejected answers are one batch, and so one forward; a copy of the model is the reference.
Run it with `python docs/examples/dpo.py`; it takes a few seconds on a CPU.
"""

import copy

import torch

import fastattn
from fastattn import losses
from fastattn.models.llama import LlamaConfig, LlamaForCausalLM

DIGITS, LENGTH = 10, 4
CONFIG = LlamaConfig(
    vocab_size=DIGITS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
ANSWER = torch.arange(2 * LENGTH - 1) >= LENGTH - 1
"""Which tokens predict one of the answer: the prompt's last, and all of the answer but the last."""


def draw(pairs: int) -> torch.Tensor:
    """Tokens (2 B, 2 LENGTH): the chosen answers repeat the prompt, and the rejected are random."""
    prompt = torch.randint(DIGITS, (pairs, LENGTH))
    answers = torch.cat((prompt, torch.randint(DIGITS, (pairs, LENGTH))))
    return torch.cat((prompt.repeat(2, 1), answers), 1)


def log_probs(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the first: (2 B, 2 LENGTH - 1), 0 for those of the prompt."""
    hidden = model.model(tokens[:, :-1]).last_hidden_state
    target = tokens[:, 1:].masked_fill(~ANSWER, -100)
    return fastattn.linear_log_prob(hidden, model.lm_head.weight, target)


def main(steps: int = 60) -> list[float]:
    """Train, and return from time to time the share of new pairs whose chosen answer is ahead."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    held_out, curve = draw(256), []
    for step in range(steps + 1):
        if step % (steps // 5) == 0:
            with torch.no_grad():
                ratios = log_probs(model, held_out) - log_probs(reference, held_out)
            chosen, rejected = ratios.sum(1).chunk(2)
            curve.append((chosen > rejected).float().mean().item())
            print(f"step {step}: the chosen answer is ahead in {curve[-1]:.2f} of new pairs")
        tokens = draw(32)
        with torch.no_grad():
            expected = log_probs(reference, tokens)
        mask = ANSWER.expand_as(expected)
        loss = losses.dpo(log_probs(model, tokens), expected, mask, beta=0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve


if __name__ == "__main__":
    main()
