"""The parts of `python -m fastattn demo`, which trains a small language model on real text.

`data` gathers the text, `tasks` says what is learnt from it, `model` makes one of
`fastattn.models` and `plain` a Llama of PyTorch's modules beside it, `training` is one run,
`experts` counts what experts get, `process` puts a run into a process of its own, `report` shows
and stores results.
"""


class DemoError(Exception):
    """The demo cannot do what was asked; the message is one line that the user can act on."""
