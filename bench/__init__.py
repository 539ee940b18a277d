"""Measurements, each a tool in a folder of its own, of the ops that registry/ has.

`timing` (`python -m bench`), `compiled` code, `host_cost`, `memory`, and `features` of attention.
"""
