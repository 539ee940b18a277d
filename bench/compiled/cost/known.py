"""Every kernel that is known not to keep the budget of predicted cost."""

KNOWN = ()
