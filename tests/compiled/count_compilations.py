"""Print how many kernels get compiled for sm_90 while the number of rows varies, as JSON.

Of each op these are `first`, for one number of rows; `chosen`, for one of each that its kernels are
chosen by (see `choice`); and `all`, for every one, which a new kernel for other rows would add to.

Run in a process of its own: Triton keeps compiled kernels by device, and the stub is one.
"""

import json
from collections.abc import Callable
from typing import Any

import torch

from fastattn.kernels.tuning import bucket
from fastattn.machine.driver import TARGETS, Recorder, stub_driver
from fastattn.ops.attention.terms import BooleanMask
from fastattn.ops.core.backends import assume_gpu, backend
from fastattn.ops.core.batch_invariance import batch_invariant
from fastattn.ops.core.catalog import OPERATIONS

ROWS = (1, 2, 3, 16, 17, 31, 1000, 1023, 4096, 65_537, 1_000_000)
COLUMNS = 16

MOST_ROWS = 10_000
"""Of products, whose other matrix is large."""

BLOCK_OF_KEYS = 64
"""Keys of a block of decode attention, with heads of COLUMNS."""

CUT_BY_ROWS = (
    "matmul",
    "linear",
    "gated_linear",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_jsd",
    "linear_top_k_kl",
    "grouped_linear",
    "mixture",
)
"""Ops whose rule of block sizes asks for the magnitude of the row count, see `bucket`."""


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def matrices(*names: str) -> Callable[[int], dict[str, torch.Tensor]]:
    """Arguments that are all (rows, COLUMNS)."""
    return lambda rows: {name: zeros(rows, COLUMNS) for name in names}


def classified(rows: int) -> dict[str, torch.Tensor]:
    return {"logits": zeros(rows, COLUMNS), "target": torch.zeros(rows, dtype=torch.int64)}


def scaled(rows: int) -> dict[str, Any]:
    """Another logit scale for each number of rows: no kernel is compiled for one of them."""
    return {**classified(rows), "logit_scale": 1.0 + rows}


def cached(rows: int) -> dict[str, Any]:
    """Room for another number of keys, of which there are fewer."""
    cache = torch.zeros(1, 2, rows, COLUMNS, dtype=torch.bfloat16)
    lengths = torch.tensor([rows // 2])
    return {"q": zeros(1, 4, 1, COLUMNS), "k": cache, "v": cache, "lengths": lengths, "splits": 4}


def in_parts(rows: int) -> dict[str, torch.Tensor]:
    return {"o": zeros(3, rows, COLUMNS), "lse": zeros(3, rows).float()}


def tempered(rows: int) -> dict[str, Any]:
    """Another temperature for each number of rows, with a cap behind which it stays by itself."""
    return {
        **classified(rows),
        "temperature": 1.0 + rows,
        "softcap": 30.0,
        "return_entropy": True,
        "return_correct": True,
    }


def rotated(*names: str) -> Callable[[int], dict[str, torch.Tensor]]:
    """Arguments of two heads of as many tokens as rows, with the angles of each position."""

    def make(rows: int) -> dict[str, torch.Tensor]:
        angles = torch.zeros(rows, COLUMNS // 2)
        heads = {name: zeros(1, 2, rows, COLUMNS) for name in names}
        return {**heads, "cos": angles, "sin": angles}

    return make


def heads(rows: int) -> dict[str, Any]:
    """q, k and v of two heads of as many tokens as rows, in either order of memory."""
    if rows % 2:
        return {name: zeros(1, 2, rows, COLUMNS) for name in "qkv"}
    return {name: zeros(1, rows, 2, COLUMNS).transpose(1, 2) for name in "qkv"}


def attended(rows: int) -> dict[str, Any]:
    """Every term whose functions are the same at any length, with integers that vary."""
    return {
        **heads(rows),
        "causal": True,
        # Up to one that no distance reaches.
        "window": (rows**3, rows // 2),
        "softcap": float(rows),
        "alibi_slopes": torch.zeros(2),
        "kv_lengths": torch.zeros(1, dtype=torch.int32),
        "return_lse": True,
    }


def by_functions(rows: int) -> dict[str, Any]:
    """Plain functions with numbers, and tensors of lengths, that vary; one of them learns."""
    window, factor = rows // 2, 1.0 / rows
    documents = torch.zeros(1, rows, dtype=torch.int32)
    table, slopes = (torch.zeros(2, 8, requires_grad=True) for _ in range(2))

    def score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = (q_idx - kv_idx).clamp(0, 7)
        return score * factor + table[h, distance] * slopes[b, h]

    def near(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx < window) & (documents[b, q_idx] == documents[b, kv_idx])

    return {**heads(rows), "score_mods": [score], "mask_mod": near}


def of_pairs(rows: int) -> dict[str, Any]:
    """Rows of pairs, two or more, which share a bias."""
    rows = min(rows, 4096) + 1
    bias = torch.zeros(2, 1, 1, 16, 16, requires_grad=True)
    return {**{name: zeros(2, rows, 1, 16, COLUMNS) for name in "qkv"}, "bias": bias}


def modulated(rows: int) -> dict[str, torch.Tensor]:
    """Samples of as many tokens as rows, with a modulation each."""
    modulation = {name: zeros(2, COLUMNS) for name in ("shift", "scale")}
    return {"x": zeros(2, rows, COLUMNS), **modulation}


def masked(rows: int) -> dict[str, Any]:
    """Masks, whose rows are aligned to 16 bytes at some lengths alone."""
    rows = min(rows, 4096)
    return {**heads(rows), "mask": torch.ones(rows, rows, dtype=torch.bool)}


def weighed(rows: int) -> dict[str, Any]:
    rows = min(rows, 1024)
    return {**{name: zeros(1, 2, rows, COLUMNS) for name in "qk"}, "lse": torch.zeros(1, 2, rows)}


def packed(rows: int) -> dict[str, Any]:
    places = torch.tensor([0, *(rows,) * (rows % 5 + 1)], dtype=torch.int32)
    return {
        **{name: zeros(rows, 2, COLUMNS) for name in "qkv"},
        "cu_seqlens_q": places,
        "cu_seqlens_k": places,
        "max_seqlen_q": rows,
        "max_seqlen_k": rows,
        "causal": True,
    }


def times_weights(*names: str) -> Callable[[int], dict[str, Any]]:
    """x, the only argument with a gradient, and weights with a long sum."""
    weights = {name: torch.zeros(COLUMNS, 4096, dtype=torch.bfloat16) for name in names}
    return lambda rows: {"x": zeros(min(rows, MOST_ROWS), 4096), **weights}


def times_matrix(rows: int) -> dict[str, Any]:
    rows = min(rows, MOST_ROWS)
    return {"a": zeros(rows, 4096), "b": torch.zeros(4096, 64, dtype=torch.bfloat16)}


def grouped(rows: int) -> dict[str, Any]:
    """Rows of four experts, the last of which has none."""
    weight = torch.zeros(4, COLUMNS, 512, dtype=torch.bfloat16)
    rows = min(rows, MOST_ROWS)
    places = torch.tensor([0, rows // 3, rows // 2, rows, rows], dtype=torch.int32)
    return {"x": zeros(rows, 512), "weight": weight, "offsets": places}


def mixed(rows: int) -> dict[str, Any]:
    """Tokens of which each has two of four experts."""
    rows = min(rows, MOST_ROWS)
    ids = torch.arange(2 * rows).view(rows, 2) % 3
    weights = {
        "w_gate_up": torch.zeros(4, 256, COLUMNS, dtype=torch.bfloat16),
        "w_down": torch.zeros(4, COLUMNS, 128, dtype=torch.bfloat16),
    }
    return {"x": zeros(rows, COLUMNS), "ids": ids, "weights": zeros(rows, 2), **weights}


def classified_products(rows: int) -> dict[str, Any]:
    return {
        **times_weights("weight")(rows),
        "target": torch.zeros(min(rows, MOST_ROWS), dtype=torch.int64),
        "reduction": "none",
    }


def probable_products(rows: int) -> dict[str, Any]:
    arguments = classified_products(rows)
    del arguments["reduction"]
    return {**arguments, "return_entropy": True}


def distilled(rows: int) -> dict[str, Any]:
    rows = min(rows, MOST_ROWS)
    teacher = {"teacher_x": (rows, 64), "teacher_weight": (COLUMNS, 64)}
    return times_weights("weight")(rows) | {
        name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in teacher.items()
    }


def distilled_from_few(rows: int) -> dict[str, Any]:
    rows = min(rows, MOST_ROWS)
    return times_weights("weight")(rows) | {
        "teacher_ids": torch.zeros((rows, 4), dtype=torch.int64),
        "teacher_log_probs": torch.zeros((rows, 4)),
    }


# By the name of the op, and what stands for what, where there is more than one.
ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "rms_norm": matrices("x"),
    "layer_norm": matrices("x"),
    "add_rms_norm": matrices("x", "residual"),
    "add_layer_norm": matrices("x", "residual"),
    "gated_rms_norm": matrices("x", "gate"),
    "modulated_layer_norm": modulated,
    "modulated_rms_norm": modulated,
    "dropout": matrices("x"),
    "swiglu": matrices("gate", "up"),
    "geglu": matrices("gate"),
    "reglu": matrices("gate", "up"),
    "glu": matrices("gate"),
    "softmax": matrices("x"),
    "log_softmax": matrices("x"),
    "cross_entropy": classified,
    "cross_entropy: scales": scaled,
    "apply_rotary": rotated("x"),
    "apply_rotary_qk": rotated("q", "k"),
    "attention": heads,
    "attention: terms": attended,
    "attention: masks": masked,
    "attention: functions": by_functions,
    "attention: pairs": of_pairs,
    "attention_varlen": packed,
    "attention_weights": weighed,
    "decode_attention": cached,
    "merge_attention": in_parts,
    "matmul": times_matrix,
    "matmul: batch-invariant": times_matrix,
    "linear": times_weights("weight"),
    "linear: batch-invariant": times_weights("weight"),
    "gated_linear": times_weights("w_gate", "w_up"),
    "gated_linear: batch-invariant": times_weights("w_gate", "w_up"),
    "log_prob": classified,
    "log_prob: temperatures": tempered,
    "linear_jsd": distilled,
    "linear_top_k_kl": distilled_from_few,
    "linear_log_prob": probable_products,
    "linear_log_prob: batch-invariant": probable_products,
    "grouped_linear": grouped,
    "grouped_linear: batch-invariant": grouped,
    "mixture": mixed,
    "mixture: batch-invariant": mixed,
    "linear_cross_entropy": classified_products,
    "linear_cross_entropy: batch-invariant": classified_products,
}


def choice(name: str, rows: int) -> Any:
    """What kernels may be chosen by: where rows have the same, they have the same kernels."""
    if name in CUT_BY_ROWS:
        return bucket(min(rows, MOST_ROWS))
    if name == "attention: masks":
        return BooleanMask(masked(rows)["mask"]).function_name(torch.bfloat16)
    if name == "decode_attention":
        # The keys of one block are not parted, so that nothing is to be merged.
        return rows > BLOCK_OF_KEYS
    return None


def kernels_used(name: str, rows: int, recorder: Recorder) -> set[str]:
    """The hashes of the kernels that forward and backward launch."""
    with batch_invariant(name.endswith("batch-invariant")):
        outputs = OPERATIONS[name.split(":")[0]].function(**ARGUMENTS[name](rows))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [output for output in outputs if output.requires_grad]
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    return {kernel.metadata["hash"] for kernel in recorder.take()}


def main() -> None:
    recorder = Recorder()
    counts = {}
    with stub_driver(TARGETS["sm_90"], recorder), assume_gpu(), backend("triton"):
        for name in ARGUMENTS:
            used = {rows: kernels_used(name, rows, recorder) for rows in ROWS}
            # The first row count of each choice.
            chosen = {choice(name, rows): rows for rows in reversed(ROWS)}.values()
            counts[name] = {
                "choices": len(chosen),
                "first": len(used[ROWS[0]]),
                "chosen": len(set().union(*(used[rows] for rows in chosen))),
                "all": len(set().union(*used.values())),
            }
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
