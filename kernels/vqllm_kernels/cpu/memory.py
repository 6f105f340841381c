"""Arrays of numba at addresses that are kept as integers, and calls of functions by their address.

A call of a compiled function with a dozen arrays spends more time on its arguments than a small
product takes; one with a few integers does not.
"""

import ctypes
from typing import Any

from llvmlite import ir

from vqllm_kernels.compiled import cgutils, intrinsic, types

C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""What is made of the address of a compiled function (`compiled.entry`), to call it from Python."""


@intrinsic
def pointer(typing_context: Any, address: Any):
    """An address, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@intrinsic
def call(typing_context: Any, function: Any, argument: Any):
    """function(argument), both addresses: a C function of one pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte]).as_pointer()
        function, argument = arguments
        builder.call(builder.inttoptr(function, kind), [builder.inttoptr(argument, byte)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def prefetch(typing_context: Any, address: Any):
    """Ask for the line of the cache at an address; one outside of memory is no fault."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, number, number, number]),
            "llvm.prefetch.p0",
        )
        place = builder.inttoptr(arguments[0], byte)
        builder.call(function, [place, *(ir.Constant(number, v) for v in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.intp), generate
