"""What a kernel's machine code may cost, and every exception with its number and its reason.

The limits hold for every kernel of every op on every target. A kernel that cannot keep one gets an
entry in ALLOWANCES: where, which limit, what it may be instead, and why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .measure import Row

MAX_SPILL_BYTES = 0
"""Bytes of stack of a thread. An allowance may go up to 128."""

MIN_INSTRUCTIONS = 24
"""A kernel that loads, computes and stores has more; one that was emptied by mistake has fewer."""

MAX_INSTRUCTIONS = 8_000
"""Past it a kernel outgrows the instruction cache; what causes it is too much unrolling."""

MIN_WIDE_SHARE = 0.6
"""The share of bytes that a memory-bound kernel moves by accesses of 128 bits or more.

Counted over the instructions as they stand, loads and stores apart. What may be narrow are a row's
statistics, a number each: beside one 128-bit store of the output, mean and rstd leave 0.67.
A weight that is loaded by single elements leaves 0.5. Asked where the last dimension is divisible
by 16, as Triton needs it, and not of products, whose tiles arrive by other ways.
"""


@dataclass(frozen=True)
class Allowance:
    """An exception: rows that match every pattern may have `limit` in place of the budget's."""

    check: str
    limit: float
    reason: str
    kernel: str = "*"
    op: str = "*"
    target: str = "*"
    dtype: str = "*"
    columns: range | None = None

    def covers(self, row: Row, check: str) -> bool:
        return (
            check == self.check
            and fnmatchcase(row.kernel, self.kernel)
            and fnmatchcase(row.op, self.op)
            and fnmatchcase(row.target, self.target)
            and fnmatchcase(row.dtype, self.dtype)
            and (self.columns is None or row.shape[-1] in self.columns)
        )


ALLOWANCES: tuple[Allowance, ...] = (
    Allowance(
        "spill bytes",
        8,
        "two values of rows of 576 columns, of which a thread has eight; with more threads its "
        "loads are narrow",
        kernel="merge_attention_backward_kernel",
        target="sm_86",
        dtype="float32",
    ),
    Allowance(
        "wide stores",
        0.0,
        "of many parts that are read one row is stored, by threads that have shared out its parts",
        kernel="merge_attention_kernel",
    ),
    Allowance(
        "spill bytes",
        96,
        "the sums of the table's gradient, a row a query, beside the tile",
        kernel="attention_queries_backward_kernel",
        op="attention relative bias",
        target="gfx1100",
    ),
    Allowance(
        "spill bytes",
        24,
        "the sums of the table's gradient, a row a query, beside the tile",
        kernel="attention_queries_backward_kernel",
        op="attention relative bias",
        target="sm_90",
    ),
    Allowance(
        "spill bytes",
        16,
        "the sums of the table's gradient, a row a query, beside the tile",
        kernel="attention_queries_backward_kernel",
        op="attention relative bias",
        target="sm_120",
        columns=range(96, 97),
    ),
    Allowance(
        "spill bytes",
        48,
        "what a function computes with beside the tile: at most twelve values",
        kernel="attention_forward_kernel",
        op="attention functions",
        target="sm_*",
        columns=range(128, 129),
    ),
    Allowance(
        "spill bytes",
        8,
        "two values more than 255 registers hold: smaller tiles would load the bias and keys again",
        kernel="attention_forward_kernel",
        op="attention triangle",
        target="sm_80",
        columns=range(64, 65),
    ),
    Allowance(
        "spill bytes",
        24,
        "heads of 192 and 128: a few values, none in a loop. Tiles free of spills here and "
        "under a mask do half as many products again",
        kernel="attention_forward_kernel",
        op="attention relative bias",
        target="sm_120",
        columns=range(128, 129),
    ),
    Allowance(
        "spill bytes",
        8,
        "heads of 192 and 128: two values, none in a loop. Tiles without them wait for every load "
        "or do half as many products again",
        kernel="attention_queries_backward_kernel",
        op="attention causal",
        target="sm_120",
        columns=range(128, 129),
    ),
    Allowance(
        "spill bytes",
        56,
        "heads of 192 and 128 in the smallest tile that there is, beside the documents of queries",
        kernel="attention_keys_backward_kernel",
        op="attention documents",
        target="gfx1100",
        columns=range(128, 129),
    ),
    Allowance(
        "spill bytes",
        760,
        "latents of 576 columns and values of 512 in the smallest tile that there is, of which the "
        "matrix units want each operand twice",
        kernel="decode_attention_kernel",
        op="decode_attention, latents",
        target="gfx1100",
    ),
    Allowance(
        "spill bytes",
        44,
        "heads of 256 in the smallest tile that there is, beside random numbers for it",
        kernel="attention_*_backward_kernel",
        op="attention dropout",
        target="gfx1100",
        columns=range(256, 257),
    ),
    Allowance(
        "spill bytes",
        32,
        "values that wait for their loop, none of them stored or loaded in one",
        kernel="attention_forward_kernel",
        op="attention softcap ALiBi",
        target="sm_80",
        columns=range(128, 129),
    ),
    Allowance(
        "spill bytes",
        16,
        "a third loop, of a window's first keys: four values, none of them stored or loaded in one",
        kernel="attention_forward_kernel",
        op="attention window",
        target="sm_90",
        columns=range(128, 129),
    ),
    Allowance(
        "spill bytes",
        40,
        "heads of 256: addresses that wait for their loop, none of them stored or loaded in one. "
        "Products follow each other without a wait since",
        kernel="attention_forward_kernel",
        target="sm_90",
        columns=range(256, 257),
    ),
    Allowance(
        "spill bytes",
        24,
        "the documents of a tile's queries and keys, beside the tile",
        kernel="attention_*_kernel",
        op="attention documents",
        target="sm_1*",
    ),
    Allowance(
        "spill bytes",
        128,
        "a program holds tiles of k, v, their gradients and the scores; smaller tiles would read q "
        "and do more often. At most 20 of its instructions in a loop are spills, none where a loop "
        "goes over full blocks of heads of at most 128",
        kernel="attention_keys_backward_kernel",
        target="sm_*",
    ),
    Allowance(
        "spill bytes",
        12,
        "heads of 256 in a window or in packed sequences: three values, one of them in a loop",
        kernel="attention_keys_backward_kernel",
        target="gfx942",
    ),
    Allowance(
        "spill bytes",
        24,
        "heads of 192 and 128, or of 256 with a bias: at most four spills in a loop",
        kernel="attention_queries_backward_kernel",
        target="sm_8*",
    ),
    Allowance(
        "wide stores",
        0.0,
        "a program stores one number a row, having read the rows",
        kernel="attention_delta_kernel",
    ),
    Allowance(
        "spill bytes",
        16,
        "ptxas keeps up to three values a row of dropout's random words on the stack; tiles of "
        "half the size would read rows of 8192 columns twice, which costs far more",
        kernel="norm_backward_kernel",
        op="*dropout",
        target="sm_*",
    ),
    Allowance(
        "spill bytes",
        8,
        "ptxas stops at 72 registers of 255 and keeps one value of an odd-width row on the stack, "
        "outside the loop",
        kernel="norm_backward_kernel",
        op="layer_norm",
        target="sm_90",
        dtype="float32",
        columns=range(1023, 1024),
    ),
    Allowance(
        "spill bytes",
        32,
        "ptxas keeps at most eight values of a sample's rows on the stack; tiles of half the size "
        "would read wide rows twice, which costs far more",
        kernel="modulated_norm_backward_kernel",
        target="sm_*",
        dtype="bfloat16",
        columns=range(3072, 8193),
    ),
    Allowance(
        "wide stores",
        0.0,
        "a program stores one sum a column at its end, having read up to thousands of rows",
        kernel="norm_backward_sum_kernel",
    ),
    Allowance(
        "wide stores",
        0.0,
        "a program stores one sum a column at its end, having read up to thousands of rows",
        kernel="norm_backward_weight_kernel",
        target="gfx*",
    ),
    Allowance(
        "wide loads",
        0.39,
        "of a table's pairs of equal numbers a program reads one by itself, once for eight heads",
        kernel="rotary_kernel",
        op="apply_rotary_qk full width, interleaved",
    ),
    Allowance(
        "wide stores",
        0.0,
        "a program stores one number, having read a wide group of columns",
        kernel="gated_norm_statistics_kernel",
    ),
    Allowance(
        "wide stores",
        0.0,
        "a program stores one number, having read a wide group of columns",
        kernel="gated_norm_mean_kernel",
    ),
    Allowance(
        "wide loads",
        0.0,
        "16 wavefronts of 64 threads, which a group of 4096 columns leaves four numbers each",
        kernel="gated_norm_*_kernel",
        target="gfx942",
        columns=range(8193, 2**30),
    ),
    Allowance(
        "wide stores",
        0.0,
        "a program stores a few numbers a row, having read the row's logits",
        kernel="cross_entropy_forward_kernel",
    ),
    Allowance(
        "wide stores",
        0.0,
        "a program stores six numbers a row, having read the logits of both heads twice",
        kernel="jsd_forward_kernel",
    ),
    Allowance(
        "wide loads",
        0.35,
        "a row of few logits weighs little beside its target and the other numbers of the row",
        kernel="cross_entropy_*_kernel",
        columns=range(1, 256),
    ),
    Allowance(
        "wide loads",
        0.5,
        "two loads of 128 bits are all of a thread's logits, beside six numbers of their row that "
        "its threads read alike",
        kernel="cross_entropy_backward_kernel",
        op="*log_prob*",
    ),
    Allowance(
        "wide loads",
        0.57,
        "as above, beside five numbers of their row",
        kernel="cross_entropy_backward_kernel",
        op="linear_top_k_kl",
    ),
    Allowance(
        "spill bytes",
        96,
        "16-bit elements of an odd width are loaded and stored one by one, each with its address. "
        "None of it is in the loop",
        kernel="matmul_kernel",
        target="sm_*",
        dtype="bfloat16",
        columns=range(1023, 1024),
    ),
    Allowance(
        "spill bytes",
        56,
        "16-bit elements of an odd width are loaded and stored one by one, each with its address. "
        "None of it is in the loop",
        kernel="gated_linear_*_kernel",
        target="sm_*",
        dtype="bfloat16",
        columns=range(1023, 1024),
    ),
    Allowance(
        "spill bytes",
        44,
        "addresses of an odd width, outside of the products",
        kernel="gated_linear_backward_kernel",
        target="gfx942",
        dtype="float32",
        columns=range(1023, 1024),
    ),
    Allowance(
        "spill bytes",
        16,
        "on the ordinary units a step unrolls into hundreds of multiplications, and ptxas keeps up "
        "to four values of a thread on the stack, none of them in the loop",
        kernel="*linear_forward_kernel",
        target="sm_*",
        dtype="float32",
    ),
    Allowance(
        "spill bytes",
        24,
        "as above, of six values of a thread",
        kernel="matmul_kernel",
        op="linear_jsd",
        target="sm_8?",
        dtype="float32",
    ),
    Allowance(
        "spill bytes",
        24,
        "as above, in the same product of the same sizes",
        kernel="matmul_kernel",
        op="linear_top_k_kl",
        target="sm_8?",
        dtype="float32",
    ),
    Allowance(
        "spill bytes",
        16,
        "on the ordinary units a step unrolls into hundreds of multiplications, and ptxas keeps up "
        "to four values of a thread on the stack, none of them in the loop",
        kernel="matmul_kernel",
        target="sm_*",
        dtype="float32",
    ),
    Allowance(
        "spill bytes",
        8,
        "two values of a thread, outside of the loop",
        kernel="matmul_kernel",
        op="linear_*",
        target="sm_100",
        dtype="bfloat16",
    ),
    Allowance(
        "wide stores",
        0.0,
        "where a bias has no activation behind it, a program stores one sum a column at its end, "
        "having read 128 rows",
        kernel="linear_backward_kernel",
        op="gated_linear*",
    ),
    Allowance(
        "spill bytes",
        16,
        "on the ordinary units a step unrolls into hundreds of multiplications, and ptxas keeps up "
        "to four values of a thread on the stack",
        kernel="experts_*_kernel",
        target="sm_*",
        dtype="float32",
    ),
    Allowance(
        "spill bytes",
        8,
        "1023 columns of 16 bits are loaded and stored one by one, each with its address",
        kernel="experts_forward_kernel",
        target="sm_8*",
        dtype="bfloat16",
    ),
    Allowance(
        "spill bytes",
        16,
        "a plain product of experts on the ordinary units, with up to four values on the stack",
        kernel="grouped_*_kernel",
        target="sm_*",
        dtype="float32",
    ),
)


def problems(row: Row, allowances: Iterable[Allowance] = ALLOWANCES) -> list[str]:
    """Say what in a row is over budget, one short sentence each."""
    allowances = tuple(allowances)

    def limit(check: str, default: float) -> float:
        matching = (allowance.limit for allowance in allowances if allowance.covers(row, check))
        return next(matching, default)

    found: list[str] = []

    def at_most(check: str, value: float, default: float) -> None:
        if value > (most := limit(check, default)):
            found.append(f"{check} {value:g} > {most:g}")

    def at_least(check: str, value: float, default: float) -> None:
        if value < (least := limit(check, default)):
            found.append(f"{check} {value:.3g} < {least:.3g}")

    code = row.code
    at_most("shared memory", row.shared_memory, row.shared_memory_limit)
    at_most("spill bytes", code.spill_bytes, MAX_SPILL_BYTES)
    at_least("instructions", code.instructions, MIN_INSTRUCTIONS)
    at_most("instructions", code.instructions, MAX_INSTRUCTIONS)
    at_least("stores", sum(code.stores.values()) + code.bulk_copies + code.atomics, 1)
    at_least("tensor-core instructions", code.tensor_core, row.tensor_core_dots)
    if row.dots == 0 and row.shape[-1] % 16 == 0:
        at_least("wide loads", wide_share(code.loads), MIN_WIDE_SHARE)
        at_least("wide stores", wide_share(code.stores), MIN_WIDE_SHARE)
    return found


def wide_share(widths: dict[int, int]) -> float:
    """The share of bytes moved by accesses of 128 bits or more; 1 where nothing is moved."""
    total = sum(bits * count for bits, count in widths.items())
    wide = sum(bits * count for bits, count in widths.items() if bits >= 128)
    return wide / total if total else 1.0
