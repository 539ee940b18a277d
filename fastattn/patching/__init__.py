"""Put fastattn's modules in the places of those of an existing model, and take them out again.

`rules` has the table of what becomes what, which integrations extend by a `Rule` of their own;
`swap` walks a model and changes it; `report` says what was done and what was not.
"""

from .report import LeftAlone, Replaced, Report
from .rules import RULES, Rule
from .swap import patch, unpatch

__all__ = ["RULES", "LeftAlone", "Replaced", "Report", "Rule", "patch", "unpatch"]
