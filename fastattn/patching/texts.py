"""The text of a class's forward, and a forward made from it with some calls replaced.

What a model calls is often a function of its module, or a sum between two calls, which no class
stands for. Copies of forwards would be right for one version of transformers. So a forward is made
from the class's own text, wherever that is at hand: functions that are replaced become variables of
a function around it, its globals stay those of the module, which is not touched, and the wrappers
around it are made again around the new one.
"""

import ast
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

Forward = Callable[..., Any]


@functools.cache
def read_text(forward: Forward) -> ast.FunctionDef | None:
    """The definition of a function inside its wrappers, or None where there is no text of it.

    Only what compiles to the names and constants of the function counts as its text. (Instructions
    also depend on what the module around it imports.)
    """
    inner = inspect.unwrap(forward)
    code = getattr(inner, "__code__", None)
    if code is None or code.co_freevars:
        return None
    try:
        # In a block, for a method's text is indented.
        block = ast.parse("if True:\n" + inspect.getsource(inner)).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    assert isinstance(block, ast.If)
    definition = block.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    ast.increment_lineno(definition, code.co_firstlineno - 2)
    _strip(definition)
    if _content(_make(definition, inner, {}).__code__) != _content(code):
        return None
    return definition


def write_forward(
    forward: Forward, definition: ast.FunctionDef, names: Mapping[str, Any]
) -> Forward:
    """A function of another definition in the wrappers that a forward has.

    Args:
        forward: where wrappers, globals, defaults and the rest come from.
        definition: `read_text(forward)`, or a changed copy.
        names: what names in it mean that would be globals, or are new.

    Raises:
        ValueError: a wrapper does not hold the function that it wraps in its closure.
    """
    inner = inspect.unwrap(forward)
    made = _make(definition, inner, names)
    made.__defaults__, made.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
    functools.update_wrapper(made, inner)
    del made.__wrapped__  # type: ignore[attr-defined]
    return _wrap(forward, made)


def called_names(definition: ast.FunctionDef) -> set[str]:
    """The names that are called as functions."""
    calls = (node.func for node in ast.walk(definition) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def _content(code: types.CodeType) -> tuple[Any, ...]:
    """What tells one text from another."""
    constants = [_content(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return code.co_names, code.co_varnames, code.co_argcount, constants


def _strip(definition: ast.FunctionDef) -> None:
    """Take away what is evaluated when the function is made."""
    definition.decorator_list = []
    definition.returns = None
    arguments = definition.args
    optional = (arguments.vararg, arguments.kwarg)
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *optional):
        if argument is not None:
            argument.annotation = None
    nothing = ast.Constant(None)
    arguments.defaults = [nothing] * len(arguments.defaults)
    arguments.kw_defaults = [None if d is None else nothing for d in arguments.kw_defaults]


def _make(
    definition: ast.FunctionDef, inner: types.FunctionType, names: Mapping[str, Any]
) -> types.FunctionType:
    """The function of a definition, with the globals of another."""
    given = [ast.arg(name) for name in names]
    arguments = ast.arguments([], given, None, [], [], None, [])
    body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    maker = ast.parse("def make(): pass").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.args, maker.body = arguments, body
    module = ast.fix_missing_locations(ast.Module([maker], []))
    compiled = compile(module, inner.__code__.co_filename, "exec", dont_inherit=True)
    made: dict[str, Any] = {}
    exec(compiled, inner.__globals__, made)
    return made["make"](**names)


def _wrap(forward: Any, inner: Forward) -> Forward:
    """`inner` in copies of the wrappers that a function has."""
    wrapped = getattr(forward, "__wrapped__", None)
    if wrapped is None:
        return inner
    again = _wrap(wrapped, inner)
    cells = forward.__closure__ or ()
    held = [_holds(cell, wrapped) for cell in cells]
    if not any(held):
        raise ValueError(f"{forward.__qualname__} does not hold what it wraps")
    closure = tuple(
        types.CellType(again) if here else cell for cell, here in zip(cells, held, strict=True)
    )
    copied = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, closure
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(copied, again)


def _holds(cell: types.CellType, wrapped: Any) -> bool:
    try:
        return cell.cell_contents is wrapped
    except ValueError:  # It is empty.
        return False
