"""GRPO with a toy reward: a small Llama learns to answer with the prompt's first digit.

Answers are sampled in groups, a reward is the share of right digits, and an advantage is what an
answer gets beyond the mean of its group. Run it with `python docs/examples/grpo.py`; it takes a
few seconds on a CPU.
"""

import copy

import torch

import fastattn
from fastattn import losses
from fastattn.models.llama import LlamaConfig, LlamaForCausalLM

DIGITS, PROMPT, LENGTH, GROUP = 5, 2, 4, 8
CONFIG = LlamaConfig(
    vocab_size=DIGITS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
)


def sample(model: LlamaForCausalLM, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts with LENGTH sampled digits behind each."""
    tokens = prompts
    with torch.no_grad():
        for _ in range(LENGTH):
            p = model(tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat((tokens, torch.multinomial(p, 1)), 1)
    return tokens


def log_probs(model: LlamaForCausalLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities and entropies (B, LENGTH) of the digits that were sampled."""
    hidden = model.model(tokens[:, :-1]).last_hidden_state[:, PROMPT - 1 :]
    return fastattn.linear_log_prob(
        hidden, model.lm_head.weight, tokens[:, PROMPT:], return_entropy=True
    )


def main(steps: int = 40) -> list[float]:
    """Train, and return the mean reward of every step's answers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for step in range(steps):
        prompts = torch.randint(DIGITS, (16, PROMPT)).repeat_interleave(GROUP, 0)
        tokens = sample(model, prompts)
        rewards = (tokens[:, PROMPT:] == tokens[:, :1]).float().mean(1)
        curve.append(rewards.mean().item())
        if step % 10 == 0:
            print(f"step {step}: reward {curve[-1]:.2f}")
        advantage = losses.group_advantages(rewards, GROUP)[:, None]
        with torch.no_grad():
            (old, _), (expected, _) = log_probs(model, tokens), log_probs(reference, tokens)
        mask = torch.ones_like(old, dtype=torch.bool)
        for _ in range(2):  # Two steps with the same answers: the second is away from the sampler.
            log_prob, entropy = log_probs(model, tokens)
            ratio = losses.importance_ratio(log_prob, old, mask)
            policy = losses.ppo(ratio, advantage, clip_high=0.28)
            policy = policy + 0.01 * losses.kl_estimate(log_prob, expected) - 0.001 * entropy
            loss = losses.aggregate(policy, mask, "sequence_mean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return curve


if __name__ == "__main__":
    main()
