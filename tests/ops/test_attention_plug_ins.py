"""The terms of docs/terms.md, from outside the library: what they do, and that they learn."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attention_support import check, normal, qkv, results

import fastattn
from support import DEVICE, assert_close

pytestmark = pytest.mark.kernels

PAGE = (Path(__file__).parents[2] / "docs" / "terms.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[ModuleType]:
    """The two examples as modules: Triton reads a function's source from its file."""
    folder = tmp_path_factory.mktemp("examples")
    found = []
    for place, block in enumerate(block for block in BLOCKS if "@triton.jit" in block):
        path = folder / f"example_{place}.py"
        path.write_text(block)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    return found


def test_there_are_two_examples(examples):
    assert len(examples) == 2


def test_a_learned_penalty_of_the_distance(examples):
    strength, inputs = normal(2), qkv(2, 2, 40, dim=8)
    penalty = examples[0].DistancePenalty(strength)
    check(inputs, score_mods=[penalty], causal=True)
    # Between as many queries as keys it is what ALiBi does.
    found = results(fastattn.attention, inputs, score_mods=[penalty])
    expected = results(fastattn.attention, inputs, alibi_slopes=strength)
    assert_close(found["dscore_mods"][0], expected["dalibi_slopes"], "strength")
    assert_close(found["o"], expected["o"], "o")


def test_the_prefix_is_seen_by_all(examples):
    prefix = torch.tensor([25, 0], device=DEVICE)
    inputs = qkv(2, 2, 70, dim=8)
    mask = examples[1].PrefixMask(prefix)
    check(inputs, score_mods=[mask])
    at = torch.arange(70, device=DEVICE)
    keep = (at <= at[:, None]) | (at < prefix[:, None, None])
    found = results(fastattn.attention, inputs, score_mods=[mask])
    for name, value in results(fastattn.attention, inputs, mask=keep[:, None]).items():
        assert_close(found[name], value, name)


def test_their_tensors_may_have_any_strides(examples):
    """Every second number, a column, and one number for all."""
    of_heads, of_batch = normal(4).detach(), torch.tensor([25, 1, 12], device=DEVICE)
    layouts = (
        (of_heads[::2], of_batch[::2]),
        (of_heads.view(2, 2)[:, 1], of_batch.expand(2, 3)[:, 2]),
        (of_heads[:1].expand(2), of_batch[:1].expand(2)),
    )
    for strength, prefix in layouts:
        terms = [
            examples[0].DistancePenalty(strength.requires_grad_()),
            examples[1].PrefixMask(prefix),
        ]
        check(qkv(2, 2, 40, dim=8), score_mods=terms)


def test_both_at_once_and_with_the_librarys(examples):
    check(
        qkv(2, 4, 40, 40, 8, key_heads=2),
        score_mods=[
            examples[0].DistancePenalty(normal(4)),
            examples[1].PrefixMask(torch.tensor([12, 3], device=DEVICE)),
        ],
        bias=normal(4, 40, 40),
        sinks=normal(4),
        dropout_p=0.2,
        dropout_seed=torch.tensor([4], device=DEVICE),
    )
