"""Compiled kernels run on a CPU: the PTX that Triton makes of them, executed and checked.

The kernels of this package are executed as a GPU would execute them, on CPU tensors, through the
same calls that launch them on a GPU. Every instruction is held against what PTX promises: docs/
machine.md says what is checked and what is not. To read how it works, begin with `group`, where
threads run, then `shared` and `memory`, where they meet; `parser`, `translator`, `scalar`,
`movement`, `control` and `products` are about single instructions, `variation` about what PTX
leaves open, and `execution` is what Triton calls. How a GPU runs warps that go their own ways is
told by `cta` and `warp`, then `mbarrier` and `bulk` with `tensormap`, by which they wait and copy;
`clocks` says what is ordered, and `schedule` who goes first.

Needs numpy (the extra `machine`), except for `driver`.
"""
