"""What mkdocstrings is told: a section "Example:" of ours is what Griffe calls "Examples:"."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the sections, so that their lines are shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with every object that has been read."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
