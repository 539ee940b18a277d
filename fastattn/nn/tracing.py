"""Our modules in graphs of torch.fx.

What torch.fx traces it calls with proxies, of which nobody can ask a shape. torch.nn's own modules
are therefore one node each, and it knows them by the name of their package; ours say it themselves.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch.fx
import torch.nn as nn

Forward = TypeVar("Forward", bound=Callable[..., Any])


def one_node(forward: Forward) -> Forward:
    """For a forward that cannot be traced: the module's call becomes one node of the graph.

    As with torch.nn's own, that is so unless the module itself is what shall be traced.
    """

    @functools.wraps(forward)
    def traceable(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for arg in args or kwargs.values():
            if isinstance(arg, torch.fx.Proxy):
                tracer: Any = arg.tracer
                if getattr(tracer, "root", self) is self:
                    break
                target = tracer.path_of_module(self)
                return tracer.create_proxy("call_module", target, args, kwargs)
        return forward(self, *args, **kwargs)

    return traceable  # type: ignore[return-value]
