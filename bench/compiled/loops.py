"""The innermost loops of a list of instructions, found in its control flow graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .assembly import Instruction


def innermost_loops(code: Sequence[Instruction]) -> list[list[int]]:
    """Return, for each loop that holds no other, the indices of its instructions.

    A jump to a lower address is not yet a loop: code that is rarely needed stands at a function's
    end and jumps back. A loop is an edge to an instruction from which the edge itself was reached,
    with everything that reaches the edge without passing that instruction.
    """
    successors = [_successors(code, i) for i in range(len(code))]
    predecessors: dict[int, list[int]] = defaultdict(list)
    for source, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(source)

    loops: dict[int, set[int]] = defaultdict(set)
    for tail, head in _back_edges(successors):
        loops[head] |= _body(head, tail, predecessors)
    working = {head: body for head, body in loops.items() if not _waits(code, body)}
    return [
        sorted(body)
        for head, body in working.items()
        if not any(other in body for other in working if other != head)
    ]


def _successors(code: Sequence[Instruction], index: int) -> list[int]:
    instruction = code[index]
    following = [index + 1] if instruction.falls_through and index + 1 < len(code) else []
    if instruction.jumps_to is None or instruction.opcode.startswith("CALL"):
        return following
    return [instruction.jumps_to, *following]


def _back_edges(successors: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The edges to an instruction that the depth-first walk is still inside of.

    Starting from every instruction not yet seen takes in the subroutines that calls lead to.
    """
    edges: list[tuple[int, int]] = []
    seen: set[int] = set()
    for root in range(len(successors)):
        if root in seen:
            continue
        seen.add(root)
        on_path = {root}
        walk = [(root, iter(successors[root]))]
        while walk:
            node, rest = walk[-1]
            following = next(rest, None)
            if following is None:
                on_path.discard(node)
                walk.pop()
            elif following in on_path:
                edges.append((node, following))
            elif following not in seen:
                seen.add(following)
                on_path.add(following)
                walk.append((following, iter(successors[following])))
    return edges


def _body(head: int, tail: int, predecessors: dict[int, list[int]]) -> set[int]:
    body = {head, tail}
    pending = [tail] if tail != head else []
    while pending:
        for source in predecessors[pending.pop()]:
            if source not in body:
                body.add(source)
                pending.append(source)
    return body


def _waits(code: Sequence[Instruction], body: set[int]) -> bool:
    """Whether a loop only waits: for a barrier, or forever behind the end of a function."""
    return len(body) == 1 or (
        len(body) <= 8 and any(code[i].opcode.startswith("SYNCS") for i in body)
    )
