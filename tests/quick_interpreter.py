"""Triton's interpreter without what takes most of its time and has no effect on results."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from fastattn.ops.core.backends import INTERPRETED

Sizes = tuple[int, ...]
"""A tile's shape."""

MOST_CONSTANTS = 4096
"""Constants that are remembered; loops make as many as they have rounds."""


@functools.cache
def quicken_interpreter() -> None:
    """Spare the interpreter repeated work, where it is on.

    NumPy, which computes the results, takes little of its time. Most goes into what the language
    does around each operation: at every call of a device function it prepares itself again as that
    function's module sees it, at every sum and product of integers it computes whether they
    overflow, to assert it in debug mode alone, and for every value it makes a type, checks its
    shape, and derives from types what it derived before. What is remembered here depends on types
    and constants alone. NumPy gets the same arrays as before, and every result keeps its bits.
    """
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    _prepare_once(interpreter, tl.core)
    _make_types_once(interpreter, tl.core)
    _make_values_at_once(interpreter, tl.core)
    _make_constants_once(interpreter, interpreter.interpreter_semantic)
    _match_operands_by_type(interpreter.interpreter_semantic, tl.core)
    _widen_bfloat16(interpreter)
    _map_erf(interpreter)


def _prepare_once(interpreter: Any, core: Any) -> None:
    prepared = set()
    semantic = interpreter.interpreter_semantic
    decorated = core.builtin(lambda _semantic: None).__code__

    def call(self: Any, *args: Any, **arguments: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **arguments)

    def patch(target: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        # The decorator asks for nothing but the argument that is given here. Triton 3.8 has a class
        # among the language's functions.
        code = getattr(member, "__code__", None)
        function = member.__wrapped__ if code is decorated else member

        def interpreted(*args: Any, **arguments: Any) -> Any:
            arguments["_semantic"] = semantic
            return function(*args, **arguments)

        scope.set_attr(target, name, interpreted)

    interpreter.InterpretedFunction.__call__ = call
    interpreter._patch_attr = patch
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _make_types_once(interpreter: Any, core: Any) -> None:
    """Give each type of a tile, once, the `sizes` of its shape, and `of_tensors` what they get."""
    make_type, type_to_ir = core.block_type.__init__, core.block_type.to_ir
    make_tensor = core.tensor.__init__
    numpy_dtype = interpreter._get_np_dtype
    types: dict[tuple[str, Sizes], dict[str, Any]] = {}
    shapes: dict[Sizes, tuple[Any, Any]] = {}
    numpy_dtypes: dict[str, Any] = {}

    def shape_of_tensors(of: Any) -> tuple[Any, Any]:
        example = core.tensor.__new__(core.tensor)
        make_tensor(example, None, of)
        return example.shape, example.numel

    of_scalars = shape_of_tensors(core.int32)

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        given = shape.values if type(shape) is core.tuple else shape
        sizes = tuple([getattr(size, "value", size) for size in given])
        key = element_ty.name, sizes
        found = types.get(key)
        if found is None:
            make_type(self, element_ty, shape)
            self.sizes = sizes
            self.of_tensors = shapes.setdefault(sizes, shape_of_tensors(self))
            types[key] = dict(vars(self))
        else:
            vars(self).update(found)
            self.element_ty = element_ty

    def to_ir(self: Any, builder: Any) -> Any:
        # The interpreter's types are the language's own.
        return self if builder is interpreter.interpreter_builder else type_to_ir(self, builder)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else of_scalars

    def numpy_dtype_once(of: Any) -> Any:
        name = of.scalar.name
        found = numpy_dtypes.get(name)
        if found is None:
            found = numpy_dtypes[name] = numpy_dtype(of)
        return found

    core.block_type.__init__ = init_type
    core.block_type.to_ir = to_ir
    core.tensor.__init__ = init_tensor
    interpreter._get_np_dtype = numpy_dtype_once


def _make_values_at_once(interpreter: Any, core: Any) -> None:
    unwrap = core._unwrap_if_constexpr
    plain = {core.tensor, core.dtype, core.block_type, core.pointer_type, int, float, bool, str}

    def fits(data: Any, dtype: Any) -> bool:
        # A truth value takes a byte. A pointer has no such width, and whatever is in it fits.
        return data.itemsize == 1 or data.itemsize * 8 <= getattr(dtype, "primitive_bitwidth", 64)

    def init_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data = data
        self.dtype = dtype
        self.attr = {} if attr is None else attr
        if not fits(data, dtype):
            self.__post_init__()

    def unwrap_at_once(value: Any) -> Any:
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is core.constexpr else unwrap(value)

    interpreter._validate_np_data_size = fits
    interpreter.TensorHandle.__init__ = init_handle
    core._unwrap_if_constexpr = unwrap_at_once


def _make_constants_once(interpreter: Any, semantic: Any) -> None:
    make = semantic.scalar_constant
    dtypes: dict[str, Any] = {}

    # Typed, for 1, 1.0 and True are different constants.
    @functools.lru_cache(MOST_CONSTANTS, typed=True)
    def handle_of(value: Any, dtype: str) -> Any:
        return make(value, dtypes[dtype]).handle

    def scalar_constant(value: Any, dtype: Any) -> Any:
        dtypes.setdefault(dtype.name, dtype)
        made = handle_of(value, dtype.name)
        # A handle of its own, for some operations put another array into an operand's.
        return semantic.tensor(interpreter.TensorHandle(made.data, made.dtype), dtype)

    semantic.scalar_constant = scalar_constant


def _match_operands_by_type(semantic: Any, core: Any) -> None:
    """Decide by names of dtypes, and by shapes, what has to be done to operands: mostly nothing.

    Whatever is not good as it is goes to the language's own functions, which say so.
    """
    tensor, builder = core.tensor, semantic.builder
    integers = {*core.dtype.SINT_TYPES, *core.dtype.UINT_TYPES}
    numeric = integers.union(core.dtype.FP_TYPES)
    match, broadcast, cast = (
        semantic.binary_op_type_checking_impl,
        semantic.broadcast_impl_value,
        semantic.cast,
    )
    computation_type = semantic.computation_type_impl
    computation_types: dict[tuple, Any] = {}
    dtypes: dict[str, Any] = {}

    def computation_type_once(a: Any, a_scalar: bool, b: Any, b_scalar: bool, div: bool) -> Any:
        key = a.name, a_scalar, b.name, b_scalar, div
        found = computation_types.get(key)
        if found is None:
            found = computation_types[key] = computation_type(a, a_scalar, b, b_scalar, div)
        return found

    @functools.lru_cache(MOST_CONSTANTS, typed=True)
    def takes_the_dtype(number: float, dtype: str, comes_first: bool, div: bool) -> bool:
        """Whether a number becomes one of the other operand's dtype, in which they are computed."""
        other = semantic.scalar_constant(0, dtypes[dtype])
        operands = (number, other) if comes_first else (other, number)
        return all(x.dtype.name == dtype for x in match(*operands, div_or_mod=div))

    def match_by_type(
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Any, Any]:
        if type(lhs) is tensor and type(rhs) is tensor:
            a, b = lhs.dtype.name, rhs.dtype.name
            if a in numeric and b in numeric:
                if arithmetic_check and (div_or_mod or a != b):
                    to = computation_type_once(lhs.dtype, False, rhs.dtype, False, div_or_mod)
                    lhs, rhs = cast_unless_alike(lhs, to), cast_unless_alike(rhs, to)
                return broadcast_unless_alike(lhs, rhs)
            if (allow_lhs_ptr and b in integers) or (allow_rhs_ptr and a in integers):
                return broadcast_unless_alike(lhs, rhs)
        elif arithmetic_check and (type(lhs) is tensor or type(rhs) is tensor):
            comes_first = type(rhs) is tensor
            number, other = (lhs, rhs) if comes_first else (rhs, lhs)
            dtype = other.dtype.name
            dtypes.setdefault(dtype, other.dtype)
            if (
                type(number) in (int, float)
                and dtype in numeric
                and takes_the_dtype(number, dtype, comes_first, div_or_mod)
            ):
                constant = semantic.scalar_constant(number, other.dtype)
                lhs, rhs = (constant, rhs) if comes_first else (lhs, constant)
                return broadcast_unless_alike(lhs, rhs)
        return match(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def cast_unless_alike(value: Any, to: Any, rounding: Any = None) -> Any:
        return value if value.dtype.name == to.scalar.name else cast(value, to, rounding)

    @functools.cache
    def common(a: Sizes, b: Sizes) -> Sizes | None:
        """The shape both are broadcast to, where there is one without new axes."""
        if len(a) != len(b) or any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
            return None
        return tuple(map(max, a, b))

    def grown(value: Any, sizes: Sizes) -> Any:
        to = core.block_type(value.dtype, list(sizes))
        if value.type.is_block():
            return tensor(builder.create_broadcast(value.handle, sizes), to)
        return tensor(builder.create_splat(to, value.handle), to)

    def broadcast_unless_alike(lhs: Any, rhs: Any) -> tuple[Any, Any]:
        # Tensors of one shape share the object.
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if not lhs.type.is_block():
            return grown(lhs, rhs.type.sizes), rhs
        if not rhs.type.is_block():
            return lhs, grown(rhs, lhs.type.sizes)
        a, b = lhs.type.sizes, rhs.type.sizes
        sizes = common(a, b)
        if sizes is None:
            return broadcast(lhs, rhs)
        return lhs if a == sizes else grown(lhs, sizes), rhs if b == sizes else grown(rhs, sizes)

    semantic.binary_op_type_checking_impl = match_by_type
    semantic.broadcast_impl_value = broadcast_unless_alike
    semantic.cast = cast_unless_alike
    semantic.computation_type_impl = computation_type_once


def _widen_bfloat16(interpreter: Any) -> None:
    """Convert bfloat16 to float32, whose exponents are the same, by a shift."""
    import numpy

    convert = interpreter._convert_float

    def shift(data: Any, of: Any, to: Any, rounding_mode: Any) -> Any:
        if (of.name, to.name) != ("bf16", "fp32"):
            return convert(data, of, to, rounding_mode)
        # In one order whatever the strides were, as the interpreter's own bytes are.
        return data.view(numpy.uint16).astype(numpy.uint32, order="C") << 16

    interpreter._convert_float = shift


def _map_erf(interpreter: Any) -> None:
    import numpy

    def of_elements(dtype: Any) -> Callable[[Any], Any]:
        def erf(data: Any) -> Any:
            found = numpy.empty_like(data, dtype)
            found[...] = numpy.reshape([math.erf(x) for x in data.ravel().tolist()], data.shape)
            return found

        return erf

    interpreter.np_erf_fp32 = of_elements(numpy.float32)
    interpreter.np_erf_fp64 = of_elements(numpy.float64)
