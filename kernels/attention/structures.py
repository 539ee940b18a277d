"""What attention's kernels and their device functions hand each other, by names.

What is the same in every call of a layer comes as three constexprs, TERMS, HEADS and CUT. The rest
device functions make: the place of a tile, the tile itself, and what is known so far.
"""

from typing import Any, NamedTuple

# Constexprs: what is the same in every call of a layer.


class Columns(NamedTuple):
    """How the columns of a head are held: `dim` of them, in chunks of `width` and `tail`."""

    dim: int
    width: int
    tail: int


class Heads(NamedTuple):
    """The heads of a call."""

    count: int
    group: int
    """How many query heads share a key head."""
    k: Columns
    """The columns of q and k."""
    v: Columns
    """Those of v and o."""
    scale: float | None
    """The scale in float64, where a kernel needs it as a constexpr. Otherwise it is an argument."""
    folded: bool
    """Whether scores wait for the scale until they are taken to base 2."""


class Cut(NamedTuple):
    """How a kernel is cut into tiles, and how it reads them."""

    block_m: int
    block_n: int
    divisor: int
    """What divides all strides."""
    wide: bool
    """Whether offsets within a tile need 64 bits."""
    precision: str
    """How float32 is multiplied."""
    reloads: bool
    """Whether a backward kernel loads its own tiles again in every step of its loop."""
    one_loop: bool
    """Whether the gradients of k and v have one loop for all queries."""
    exact_sums: bool
    """Whether the weights of a tile are summed without rounding, see `sum_weights`."""


class BlockLists(NamedTuple):
    """The blocks that a mask lists, by rows (blocks of queries) and by columns (blocks of keys).

    As a constexpr it has their places among the arguments of all terms.
    """

    row_counts: Any
    """(tables, rows, columns + 1) int32: how many blocks a row lists before each column."""
    row_blocks: Any
    """(tables, rows, columns) int32: the columns that a row lists, in rising order."""
    column_counts: Any
    """The same two of the table's transpose."""
    column_blocks: Any
    queries: Any
    """How many queries a block has."""
    keys: Any
    rows: Any
    columns: Any
    batch_step: Any
    """From the table of one batch element to the next; 0 where they share it."""
    head_step: Any


class Terms(NamedTuple):
    """The functions of all terms of a call, and what is known of all of them together."""

    scores: tuple
    scores_backward: tuple
    parameters_backward: tuple
    """Of each tensor that a term learns, as the next two."""
    indices: tuple
    learners: tuple[int, ...]
    """The place of its term among the score terms."""
    keeps: tuple
    key_ranges: tuple
    query_ranges: tuple
    score_counts: tuple[int, ...]
    """How many arguments each score term has."""
    score_places: tuple[int, ...]
    """Their places among the arguments of all terms, one score term after another."""
    mask_counts: tuple[int, ...]
    mask_places: tuple[int, ...]
    first_integer: int
    """The place of the first integer; the others follow it."""
    scores_hide: bool
    """Whether a term may make a score -inf."""
    scattered: bool
    """Whether a mask may hide any key from any query; it has no range then."""
    lists: BlockLists | None
    """Of the mask that lists its blocks."""
    hides_first: bool
    """Whether later queries may see fewer of the first keys."""
    hides_last: bool
    """Whether earlier queries may see fewer of the last keys."""
    ends_with_keys: bool
    """Whether a mask with a range hides all keys beyond the last, so that no other has to."""
    sources: str
    """What the functions are made of. Nothing reads it; compiled kernels are remembered by it."""
    entries: tuple[int, ...] = ()
    """For each of these how many numbers it has for a head, 0 where its gradient is not wanted, in
    the kernel that sums these gradients."""


class Bias(NamedTuple):
    """A bias whose gradient is wanted."""

    learner: int
    """Its place among the tensors that terms learn."""
    own_h: bool
    """Whether it has more than one number along the heads, or else all of them share it."""
    own_m: bool
    own_n: bool


# What device functions make.


class Arguments(NamedTuple):
    """The arguments of each score term and of each mask, and the lists of blocks if there are."""

    scores: Any
    masks: Any
    lists: Any


class Sequence(NamedTuple):
    """Where a sequence lies: its batch element in memory, its first row there, and its length."""

    element: Any
    first: Any
    length: Any


class Program(NamedTuple):
    """What a program works on: a tile of one pair of a sequence and a head."""

    pair: Any
    tile: Any
    tiles: Any
    """How many tiles each pair has."""


class HeadRows(NamedTuple):
    """Rows of one head from an address on, `stride` apart."""

    base: Any
    stride: Any


class Held(NamedTuple):
    """A tile that is loaded again whenever it is needed."""

    rows: Any
    inside: Any


class Dropout(NamedTuple):
    """What decides upon dropout in one head."""

    seed: Any
    first_row: Any
    """The head's first row in dropout's matrix of all batch elements and heads."""
    threshold: Any
    factor: Any
    """By what kept weights are multiplied."""


class Range(NamedTuple):
    """What a block sees of a sequence, by whole blocks."""

    first: Any
    """The first row that is seen by some of the block."""
    end: Any
    full_first: Any
    """The first row of those that are seen by all of it."""
    full_end: Any


class QueryTile(NamedTuple):
    """A program's queries, and the keys that any of them may see."""

    q: Any
    offs_m: Any
    place: Any
    first_n: Any
    end_n: Any


class State(NamedTuple):
    """What a tile of queries has of the keys so far."""

    acc: Any
    row_max: Any
    row_sum: Any


class KeyTile(NamedTuple):
    """A program's keys and values, as `hold_rows` gives them."""

    k: Any
    v: Any
    offs_n: Any
    inside: Any
    place: Any


class KeyGradients(NamedTuple):
    """What a tile of keys has of the gradients of k and v so far."""

    dk: Any
    dv: Any


class QueryRows(NamedTuple):
    """The queries of one head with what belongs to them: rows, and addresses of numbers."""

    q: Any
    do: Any
    log_sum: Any
    delta: Any


class GradientTile(NamedTuple):
    """Queries with the gradients that come to them. `q` and `do` are as `hold_rows` gives them."""

    q: Any
    do: Any
    log_sum: Any
    """As `weigh` takes it."""
    delta: Any
    offs_m: Any


class QueryGradients(NamedTuple):
    """What a tile of queries has of the gradients of q and of the terms' parameters so far."""

    dq: Any
    sums: Any


class ScoreGradient(NamedTuple):
    """The gradient of a tile of scores."""

    dscore: Any
    """Before all terms."""
    after: Any
    """After each score term, from the last to the first."""
    given: Any
    """The scores that each score term was given."""


class BiasTile(NamedTuple):
    """A program's tile of a bias: its first numbers along each dimension, 0 where it is shared."""

    split: Any
    """Which part of the batch elements and heads that share the tile is the program's."""
    batch: Any
    head: Any
    first_m: Any
    first_n: Any
    shared_heads: Any
    """How many heads share the tile."""
    shared_pairs: Any
    """How many batch elements and heads."""
