"""Losses of alignment: each beside its formula, written anew; masks, derivatives, bad input."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import fastattn
from fastattn import losses

B, T = 6, 5

sigmoid, exp, log = torch.sigmoid, torch.exp, torch.log


def numbers(seed: int = 0) -> dict[str, Any]:
    """Log-probabilities of two models, advantages, values and a mask with an empty sequence."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(B, T, generator=generator, dtype=torch.float64)

    log_prob = -normal(1.0).exp()
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[:, 0], mask[4] = True, False
    return {
        "log_prob": log_prob.requires_grad_(),
        "ref": log_prob.detach() + normal(0.7),
        "advantage": normal(1.0),
        "values": normal(1.0),
        "mask": mask,
    }


def sums(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sequence by sequence, token by token."""
    rows = [[v for v, m in zip(*row, strict=True) if m] for row in zip(x, mask, strict=True)]
    return torch.stack([sum(row, x.new_zeros(())) for row in rows])  # type: ignore[arg-type]


def means(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return sums(x, mask) / torch.tensor([max(1, int(row.sum())) for row in mask])


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return log(sigmoid(x))


# Of log-ratios of chosen and rejected answers, beta and label smoothing.
FORMULAS: dict[str, Any] = {
    "sigmoid": lambda c, r, b, e: (
        -(1 - e) * log_sigmoid(b * (c - r)) - e * log_sigmoid(b * (r - c))
    ),
    "ipo": lambda c, r, b, e: (c - r - 1 / (2 * b)) ** 2,
    "hinge": lambda c, r, b, e: (1 - b * (c - r)).clamp(min=0),
    "robust": lambda c, r, b, e: (
        (-(1 - e) * log_sigmoid(b * (c - r)) + e * log_sigmoid(b * (r - c))) / (1 - 2 * e)
    ),
    "bco": lambda c, r, b, e: (
        -log_sigmoid(b * c - b * (c.mean() + r.mean()).detach() / 2)
        - log_sigmoid(b * (c.mean() + r.mean()).detach() / 2 - b * r)
    ),
    "apo_zero": lambda c, r, b, e: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, b, e: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "sppo_hard": lambda c, r, b, e: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "nca": lambda c, r, b, e: (
        -log_sigmoid(b * c) - log_sigmoid(-b * c) / 2 - log_sigmoid(-b * r) / 2
    ),
}


def assert_alike(found: torch.Tensor, expected: torch.Tensor, leaf: torch.Tensor) -> None:
    """The same values, and the same gradients of a function of them."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(x.cos().sum(), leaf, retain_graph=True)[0] for x in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", losses.PREFERENCES)
def test_preferences(kind):
    n = numbers()
    smoothing = 0.1 if kind in ("sigmoid", "robust") else 0.0
    found = losses.dpo(
        n["log_prob"], n["ref"], n["mask"], beta=0.3, kind=kind, label_smoothing=smoothing
    )
    ratios = (means if kind == "ipo" else sums)(n["log_prob"] - n["ref"], n["mask"])
    expected = FORMULAS[kind](*ratios.chunk(2), 0.3, smoothing)
    assert found.shape == (B // 2,)
    assert_alike(found, expected, n["log_prob"])


def test_every_preference_is_here():
    assert FORMULAS.keys() == losses.PREFERENCES.keys()


def test_losses_without_a_reference():
    n = numbers()
    n["mask"][4, 2] = True
    c, r = means(n["log_prob"], n["mask"]).chunk(2)
    found = losses.simpo(n["log_prob"], n["mask"], beta=2.5, margin=0.5)
    assert_alike(found, -log_sigmoid(2.5 * (c - r) - 0.5), n["log_prob"])
    odds = [log(exp(x) / (1 - exp(x))) for x in (c, r)]
    found = losses.orpo(n["log_prob"], n["mask"], weight=0.3)
    assert_alike(found, -c - 0.3 * log_sigmoid(odds[0] - odds[1]), n["log_prob"])
    # An answer that is nearly certain keeps its digits, in float32 too.
    sure = torch.tensor([[-1e-9], [-1.0]])
    expected = 1e-9 - 0.1 * math.log(1 / (1 + 1e-9 / (math.e - 1.0)))
    found = losses.orpo(sure, torch.ones_like(sure, dtype=torch.bool))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_kto_and_reward():
    n = numbers()
    desirable = torch.arange(B) % 3 == 0
    baseline = losses.kto_baseline(n["ref"].flip(0), n["log_prob"], n["mask"])
    expected = sums(n["ref"].flip(0) - n["log_prob"], n["mask"]).mean().clamp(min=0)
    torch.testing.assert_close(baseline, expected.detach())
    assert not baseline.requires_grad
    distance = 0.3 * (sums(n["log_prob"] - n["ref"], n["mask"]) - baseline)
    expected = torch.where(desirable, 1.5 * (1 - sigmoid(distance)), 0.5 * (1 - sigmoid(-distance)))
    found = losses.kto(
        *(n[name] for name in ("log_prob", "ref", "mask")),
        desirable,
        baseline,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    assert_alike(found, expected, n["log_prob"])
    chosen, rejected = n["log_prob"][:, 0], n["ref"][:, 0]
    found = losses.bradley_terry(chosen, rejected, 0.4)
    assert_alike(found, log(1 + exp(rejected + 0.4 - chosen)), n["log_prob"])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_ratios(level):
    n = numbers()
    difference = n["log_prob"] - n["ref"]
    if level == "sequence":
        difference = means(difference, n["mask"])[:, None].expand(B, T)
    rho = torch.where(n["mask"], exp(difference), 1.0)
    found = losses.importance_ratio(n["log_prob"], n["ref"], n["mask"], level)
    assert_alike(found, rho, n["log_prob"])
    a = n["advantage"]
    clipped = torch.minimum(rho * a, rho.clamp(0.8, 1.3) * a)
    cases: list[tuple[dict[str, Any], torch.Tensor]] = [
        ({}, -clipped),
        ({"dual_clip": 1.5}, -torch.where(a < 0, torch.maximum(clipped, 1.5 * a), clipped)),
        ({"most": 1.4}, -torch.minimum(rho.clamp(max=1.4) * a, rho.clamp(0.8, 1.3) * a)),
    ]
    for options, expected in cases:
        ours = losses.ppo(found, a, clip_low=0.2, clip_high=0.3, **options)
        assert_alike(ours, expected, n["log_prob"])
    assert any((rho * a > clipped).any() for _ in cases)
    found = losses.cispo(n["log_prob"], found, a, clip_high=0.3)
    assert_alike(found, -rho.clamp(0, 1.3).detach() * a * n["log_prob"], n["log_prob"])


def test_divergence_estimates():
    n = numbers()
    d = n["log_prob"] - n["ref"]
    for kind, expected in (("k1", d), ("k2", d**2 / 2), ("k3", exp(-d) - 1 + d)):
        assert_alike(losses.kl_estimate(n["log_prob"], n["ref"], kind), expected, n["log_prob"])
    # Near each other nothing cancels.
    near = torch.tensor([1e-5])
    found = losses.kl_estimate(near, torch.zeros(1))
    assert found.item() == pytest.approx(0.5e-10, abs=1e-12)


def test_aggregation():
    n = numbers()
    x, mask = n["log_prob"], n["mask"]
    total = sums(x, mask).sum()
    for how, expected, count in (
        ("token_mean", total / mask.sum(), 100),
        ("sequence_mean", means(x, mask).mean(), 50),
        ("sequence_sum", total / B, 50),
        ("fixed_length", total / (B * 9), 50),
    ):
        options: dict[str, Any] = {"how": how, "length": 9 if how == "fixed_length" else None}
        own = mask.sum() if how == "token_mean" else B
        assert_alike(losses.aggregate(x, mask, **options), expected, x)
        for items in (count, torch.tensor(count)):
            found = losses.aggregate(x, mask, num_items=items, **options)
            assert_alike(found, expected * own / count, x)
    assert losses.aggregate(x, torch.zeros_like(mask)).item() == 0.0


def test_parts_of_a_batch_add_up_to_the_whole():
    n = numbers()
    x, mask = n["log_prob"], n["mask"]
    for how, items in (("token_mean", mask.sum()), ("sequence_mean", B)):
        parts = [
            losses.aggregate(x[i : i + 2], mask[i : i + 2], how, num_items=items)
            for i in range(0, B, 2)
        ]
        torch.testing.assert_close(sum(parts), losses.aggregate(x, mask, how))


def test_advantages():
    n = numbers()
    rewards, values, mask = n["advantage"], n["values"], n["mask"]
    advantages, returns = losses.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for i in range(B):
        kept = [t for t in range(T) if mask[i, t]]
        for place, t in enumerate(kept):
            expected = 0.0
            for steps, u in enumerate(kept[place:]):
                after = kept[place + steps + 1 :]
                value = values[i, after[0]].item() if after else 0.0
                delta = rewards[i, u].item() + 0.9 * value - values[i, u].item()
                expected += (0.9 * 0.8) ** steps * delta
            assert advantages[i, t].item() == pytest.approx(expected)
            assert returns[i, t].item() == pytest.approx(expected + values[i, t].item())
    assert not advantages[~mask].any()
    assert not returns[~mask].any()

    white = losses.whiten(advantages, mask)
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert white[mask].std().item() == pytest.approx(1.0, abs=1e-6)
    unshifted = losses.whiten(advantages, mask, shift=False)
    torch.testing.assert_close(unshifted[mask], white[mask] + advantages[mask].mean())
    assert not unshifted[~mask].any()

    rewards = rewards[:, 0]
    groups = rewards.view(2, 3)
    centred = groups - groups.mean(1, keepdim=True)
    found = losses.group_advantages(rewards, 3)
    expected = (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(losses.group_advantages(rewards, 3, scaled=False), centred.view(-1))


def test_the_loss_of_values():
    n = numbers()
    values = n["values"].requires_grad_()
    old, returns = n["ref"], n["advantage"]
    near = torch.maximum(torch.minimum(values, old + 0.2), old - 0.2)
    expected = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    assert_alike(losses.value_loss(values, old, returns), expected, values)
    found = losses.value_loss(values, old, returns, clip=None)
    assert_alike(found, (values - returns) ** 2 / 2, values)


@pytest.mark.parametrize("scale", [7.0, torch.tensor(7.0, dtype=torch.float64)])
def test_info_nce(scale):
    x, y, more = (normalize(torch.randn(n, 4, dtype=torch.float64)) for n in (5, 5, 3))
    inputs = [x.requires_grad_(), y.requires_grad_(), more.requires_grad_()]
    if isinstance(scale, torch.Tensor):
        inputs.append(scale.requires_grad_())
    places = torch.arange(5)
    forward = cross_entropy(scale * x @ torch.cat((y, more)).t(), places)
    reverse = cross_entropy(scale * y @ x.t(), places)
    for options, expected in (
        ({"symmetric": False}, forward),
        ({"symmetric": True}, (forward + reverse) / 2),
    ):
        found = losses.info_nce(x, y, scale, negatives=more, **options)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found, inputs),
            torch.autograd.grad(expected, inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_rows_that_count_are_packed():
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(9, (3, 4))
    target[:, ::2] = -100
    rows, targets, places = losses.pack_rows(x, target)
    assert rows.shape == (6, 6)
    packed = losses.unpack_rows(
        fastattn.linear_log_prob(rows, weight, targets), places, target.shape
    )
    expected = fastattn.linear_log_prob(x, weight, target)
    torch.testing.assert_close(packed, expected)
    for a, b in zip(
        torch.autograd.grad(packed.cos().sum(), (x, weight)),
        torch.autograd.grad(expected.cos().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def everything(log_prob: torch.Tensor, n: dict[str, Any]) -> torch.Tensor:
    """A number in which all losses of log-probabilities are."""
    ref, mask, advantage = n["ref"], n["mask"], n["advantage"]
    found = [losses.dpo(log_prob, ref, mask, kind=kind) for kind in losses.PREFERENCES]
    found += [losses.simpo(log_prob, mask), losses.orpo(log_prob - 0.1, mask)]
    baseline = losses.kto_baseline(log_prob, ref, mask)
    found.append(losses.kto(log_prob, ref, mask, mask[:, 1], baseline))
    for level in ("token", "sequence"):
        ratio = losses.importance_ratio(log_prob, ref, mask, level)
        policy = losses.ppo(ratio, advantage, dual_clip=3.0)
        policy = policy + losses.cispo(log_prob, ratio, advantage)
        policy = policy + losses.kl_estimate(log_prob, ref)
        found.append(losses.aggregate(policy, mask)[None])
    return torch.cat(found).sin().sum()


def test_what_does_not_count_reaches_nothing():
    outcomes = []
    for value in (0.0, -7.0):
        n = numbers()
        n["mask"][4, 0] = True
        for name in ("ref", "advantage"):
            n[name] = n[name].masked_fill(~n["mask"], value)
        log_prob = n["log_prob"].detach().masked_fill(~n["mask"], value).requires_grad_()
        total = everything(log_prob, n)
        (gradient,) = torch.autograd.grad(total, log_prob)
        assert not gradient[~n["mask"]].any()
        outcomes.append((total, gradient))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_derivatives_and_one_graph():
    n = numbers()
    n["mask"][4, 0] = True
    torch.compiler.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    expected = everything(n["log_prob"], n)
    assert torch.equal(compiled(n["log_prob"], n), expected)
    torch.autograd.gradgradcheck(lambda x: everything(x, n), n["log_prob"], fast_mode=True)


MASK = torch.ones(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: losses.dpo(x, x, MASK), "chosen answers and as many rejected ones"),
        (lambda x: losses.dpo(x, x, MASK, kind="dpo"), "kind must be one of sigmoid, ipo"),
        (lambda x: losses.dpo(x, x, MASK, beta=0.0), "beta must be positive"),
        (lambda x: losses.dpo(x, x, MASK, label_smoothing=0.5), "label_smoothing must be in"),
        (
            lambda x: losses.dpo(x, x, MASK, kind="ipo", label_smoothing=0.1),
            "0 but for sigmoid and robust",
        ),
        (lambda x: losses.importance_ratio(x, x, MASK, "tokens"), "level must be one of"),
        (lambda x: losses.ppo(x, x, dual_clip=0.5), "dual_clip must be more than 1"),
        (lambda x: losses.ppo(x, x, most=1.1), "most must be more than 1.2"),
        (lambda x: losses.kl_estimate(x, x, "k4"), "kind must be one of"),
        (lambda x: losses.aggregate(x, MASK, "mean"), "how must be one of"),
        (lambda x: losses.aggregate(x, MASK, "fixed_length"), "length belongs to"),
        (lambda x: losses.aggregate(x, MASK, length=3), "length belongs to"),
        (lambda x: losses.group_advantages(x[:, 0], 2), "a multiple of group_size"),
        (lambda x: losses.info_nce(x, x[:2]), "must be"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2))
