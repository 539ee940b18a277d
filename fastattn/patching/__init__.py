"""Put fastattn's modules in the places of those of an existing model, and take them out again.

`rules` has the table of what becomes what, which integrations extend by a `Rule` of their own;
`norms` knows norms by what they compute, `mlp` feed-forward layers by what they call, and
`libraries` who else has rules; `twins` makes classes that keep the name of another, and `texts` a
forward from another's text; `swap` walks a model and changes it; `report` says what was done and
what was not.
"""

from .report import Changed, LeftAlone, Replaced, Report
from .rules import RULES, Finder, Rule, Wanted
from .swap import patch, plain_class, unpatch
from .twins import make_twin

__all__ = [
    "RULES",
    "Changed",
    "Finder",
    "LeftAlone",
    "Replaced",
    "Report",
    "Rule",
    "Wanted",
    "make_twin",
    "patch",
    "plain_class",
    "unpatch",
]
