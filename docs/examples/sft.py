"""Supervised fine-tuning with masked prompts: a small Llama learns to answer with each digit + 1.

Only the answer's tokens have a label, and the logits of all tokens never exist. Run it with
`python docs/examples/sft.py`; it takes a few seconds on a CPU.
"""

import torch

import fastattn
from fastattn import losses
from fastattn.models.llama import LlamaConfig, LlamaForCausalLM

DIGITS, LENGTH, IGNORED = 10, 4, -100
CONFIG = LlamaConfig(
    vocab_size=DIGITS + 1,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, 2 LENGTH + 1) of prompt, separator and answer, and what each is to predict."""
    prompt = torch.randint(DIGITS, (batch, LENGTH))
    separator = torch.full((batch, 1), DIGITS)
    tokens = torch.cat((prompt, separator, (prompt + 1) % DIGITS), 1)
    labels = tokens.roll(-1, 1)
    labels[:, :LENGTH] = IGNORED  # The prompt predicts nothing,
    labels[:, -1] = IGNORED  # and behind the last token there is none.
    return tokens, labels


def evaluate(model: LlamaForCausalLM) -> float:
    """The share of the answers' tokens that greedy decoding would take."""
    tokens, labels = draw(128)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        _, correct = fastattn.linear_log_prob(
            hidden, model.lm_head.weight, labels, return_correct=True
        )
    return (correct.sum() / (labels != IGNORED).sum()).item()


def main(steps: int = 100) -> list[float]:
    """Train, and return the accuracy from time to time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = [evaluate(model)]
    for step in range(1, steps + 1):
        tokens, labels = draw(32)
        hidden = model.model(tokens).last_hidden_state
        log_prob = fastattn.linear_log_prob(hidden, model.lm_head.weight, labels)
        loss = losses.aggregate(-log_prob, labels != IGNORED, "token_mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 5) == 0:
            curve.append(evaluate(model))
            print(f"step {step}: loss {loss.item():.3f}, accuracy {curve[-1]:.2f}")
    return curve


if __name__ == "__main__":
    main()
