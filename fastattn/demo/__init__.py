"""The parts of `python -m fastattn demo`, which trains a small language model on real text.

`data` gathers the text, `model` holds the transformer and the table of its pieces, `training`
is one run, `process` puts a run into a process of its own, `report` shows and stores results.
"""


class DemoError(Exception):
    """The demo cannot do what was asked; the message is one line that the user can act on."""
