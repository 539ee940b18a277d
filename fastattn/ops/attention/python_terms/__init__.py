"""Score terms and masks written as plain Python functions: traced, printed as Triton, and called.

`trace` finds out what a function computes; `printing` writes that as Triton; `terms` makes terms of
both, which call the function itself on the reference backend.
"""
