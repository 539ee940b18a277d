"""choose(): tables before rules, the nearest shape, limits of the device, and broken tables."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from fastattn.kernels import tuning
from fastattn.kernels.config import INTERPRETER, Target
from fastattn.kernels.tuning import bucket, choose

SM_80 = Target("cuda", 80, 32, multiprocessors=108, shared_memory=166912)
SM_86 = Target("cuda", 86, 32, multiprocessors=28, shared_memory=101376)
SM_90 = Target("cuda", 90, 32, multiprocessors=132, shared_memory=232448)
GFX942 = Target("hip", "gfx942", 64, multiprocessors=304, shared_memory=65536)


@dataclass(frozen=True)
class Config:
    """What a kernel's configuration looks like."""

    block: int
    num_warps: int = 4


RULE = Config(1)


def rule(target: Target, **features: Any) -> Config:
    return RULE


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch) -> Any:
    """Two empty folders in the place of the user's and the shipped tables: (user's, shipped)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(tuning, "SHIPPED_TABLES", shipped)
    shipped.mkdir()
    tuning.user_tables().mkdir(parents=True)
    tuning.forget_tables()
    yield tuning.user_tables(), shipped
    tuning.forget_tables()


def write(folder: Path, name: str, *entries: dict[str, Any], **changed: Any) -> None:
    table = {"format": tuning.TABLE_FORMAT, "kernels": {"kernel": list(entries)}} | changed
    (folder / f"{name}.json").write_text(json.dumps(table))


def entry(block: int, shared_memory: int = 1000, **features: Any) -> dict[str, Any]:
    return {
        "features": {"n": 1024, "dtype": "bfloat16"} | features,
        "config": asdict(Config(block)),
        "shared_memory": shared_memory,
    }


def chosen(target: Target = SM_90, n: int = 1024, dtype: str = "bfloat16") -> int:
    return choose("kernel", rule, target, n=bucket(n), dtype=dtype).block


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (4097, 8192)]
)
def test_buckets_are_powers_of_two(size, expected):
    assert bucket(size) == expected


def test_without_a_table_the_rule_decides():
    assert chosen() == RULE.block


def test_the_users_table_comes_before_the_shipped_one(tables):
    user, shipped = tables
    write(shipped, "sm90", entry(2))
    assert chosen() == 2
    write(user, "sm90", entry(3))
    tuning.forget_tables()
    assert chosen() == 3


def test_an_exact_shape_comes_before_a_near_one(tables):
    write(tables[1], "sm90", entry(2, n=2048), entry(3, n=1000), entry(4, n=512))
    # What was measured at 1000 stands for all that a bucket of 1024 holds.
    assert chosen(n=600) == 3
    assert chosen(n=4096) == 2
    assert chosen(n=256) == 4


def test_a_far_shape_does_not_count(tables):
    write(tables[1], "sm90", entry(2, n=1024))
    assert chosen(n=1024 << tuning.MOST_DOUBLINGS) == 2
    assert chosen(n=1024 << (tuning.MOST_DOUBLINGS + 1)) == RULE.block
    assert chosen(n=1024 >> (tuning.MOST_DOUBLINGS + 1)) == RULE.block


def test_what_is_no_size_has_to_be_equal(tables):
    write(tables[1], "sm90", entry(2, dtype="float32"), entry(3, more=True))
    assert chosen() == RULE.block
    assert chosen(dtype="float32") == 2


def test_another_kernel_and_another_architecture_do_not_count(tables):
    write(tables[1], "sm90", entry(2))
    write(tables[1], "gfx942", entry(3))
    assert choose("other", rule, SM_90, n=bucket(1024), dtype="bfloat16") == RULE
    assert chosen(SM_80) == RULE.block
    assert chosen(GFX942) == 3
    assert chosen(Target("hip", "gfx1100", 32, 96, 65536)) == RULE.block


def test_a_lower_capability_serves_where_there_is_no_table(tables):
    user, shipped = tables
    write(user, "sm80", entry(2))
    assert chosen(SM_86) == 2
    write(shipped, "sm86", entry(3))
    tuning.forget_tables()
    assert chosen(SM_86) == 3
    assert chosen(SM_90) == 3
    assert chosen(SM_80) == 2


def test_what_does_not_fit_the_device_is_passed_over(tables):
    write(tables[1], "sm80", entry(2, shared_memory=166912), entry(3, 101376, n=2048))
    assert chosen(SM_80) == 2
    # The near shape, whose entry fits.
    assert chosen(SM_86) == 3
    write(tables[1], "sm80", entry(2, shared_memory=101377))
    tuning.forget_tables()
    assert chosen(SM_86) == RULE.block


def test_the_interpreter_has_no_table(tables):
    write(tables[1], "sm90", entry(2))
    write(tables[1], "interpreter", entry(2))
    assert chosen(INTERPRETER) == RULE.block


def test_answers_are_remembered(tables, monkeypatch):
    asked = []

    def counted(target: Target, **features: Any) -> Config:
        asked.append(features)
        return RULE

    for n in (1000, 1024, 513):
        choose("kernel", counted, SM_90, n=bucket(n), dtype="bfloat16")
    assert asked == [{"n": 1024, "dtype": "bfloat16"}]
    monkeypatch.setattr(tuning, "MOST_ANSWERS", 4)
    for n in range(20):
        choose("kernel", counted, SM_90, n=n, dtype="bfloat16")
        assert len(tuning._answers) <= 4


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        json.dumps({"format": 999, "kernels": {}}),
        json.dumps({"format": tuning.TABLE_FORMAT, "kernels": {"kernel": [{"config": {}}]}}),
    ],
)
def test_a_broken_table_is_named(tables, text):
    (tables[0] / "sm90.json").write_text(text)
    with pytest.raises(ValueError, match=r"sm90\.json is no table .*python -m fastattn tune"):
        chosen()


def test_fields_of_another_version_are_named(tables):
    old = entry(2)
    old["config"] = {"block": 2, "gone": 1}
    write(tables[0], "sm90", old)
    with pytest.raises(ValueError, match=r"kernel has the fields \['block', 'gone'\]"):
        chosen()
