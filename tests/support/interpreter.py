"""Makes Triton's interpreter sum products in fp64, round them once, and work with less overhead.

NumPy's BLAS does not guarantee the order of sums: on some processors, an element's bits depend on
its column, so two kernels with different tiles would differ, unlike on tensor cores.

The tests' blocks are small, so the interpreter would spend nearly all of its time on bookkeeping.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
import types
from typing import Any

import numpy as np


def adapt_interpreter() -> None:
    """Adapt the interpreter, if it is loaded."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    _sum_products_in_fp64(interpreter)
    # Skip the checks for integer overflows, whose results are ignored outside of debugging.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _search_language_once(interpreter)
    _share_types(interpreter)
    _launch_one_at_a_time(interpreter)


def _sum_products_in_fp64(interpreter: Any) -> None:
    """Replace the interpreter's ``tl.dot``; ``ptx`` rounds products in the same way."""
    builder = interpreter.InterpreterBuilder
    original, handle = builder.create_dot, interpreter.TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not all(np.issubdtype(operand.data.dtype, np.floating) for operand in (a, b)):
            return original(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return handle(product.astype(d.data.dtype), d.dtype.scalar)

    builder.create_dot = create_dot


def _search_language_once(interpreter: Any) -> None:
    """Replace ``triton.language`` once per launch, from a list that the first launch creates.

    Triton searches the module at each launch, and again at each call of a device function.
    """
    language, patch = interpreter.tl, interpreter._patch_lang
    everything = types.SimpleNamespace(__globals__={"tl": language, "core": language.core})
    changes: list[tuple[Any, str, Any, Any]] = []

    class Scope:
        def restore(self) -> None:
            for owner, name, before, _ in reversed(changes):
                if before is interpreter._MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

    def replace_language(kernel: Any) -> Scope:
        if not changes:
            for owner, name, before in patch(everything)._changes:
                changes.append((owner, name, before, inspect.getattr_static(owner, name)))
        for owner, name, _, after in changes:
            setattr(owner, name, after)
        return Scope()

    interpreter._patch_lang = replace_language
    device_function = interpreter.InterpretedFunction
    device_function.__call__ = lambda self, *args, **keywords: self.rewrite()(*args, **keywords)


def _launch_one_at_a_time(interpreter: Any) -> None:
    """Make threads wait for each other, since a launch replaces parts of ``triton.language``."""
    executor, lock = interpreter.GridExecutor, threading.RLock()
    launch = executor.__call__

    def alone(self: Any, *args: Any, **keywords: Any) -> Any:
        with lock:
            return launch(self, *args, **keywords)

    executor.__call__ = alone


def _share_types(interpreter: Any) -> None:
    """Create each block type once, and cache the properties of types."""
    core = interpreter.tl.core
    block, constexpr, tensor = core.block_type, core.constexpr, core.tensor
    semantic = type(interpreter.interpreter_semantic)
    init_block, init_tensor, unwrap = block.__init__, tensor.__init__, core._unwrap_if_constexpr
    broadcast, np_dtype = semantic.broadcast_impl_value, interpreter._get_np_dtype
    blocks: dict[Any, Any] = {}
    np_dtypes: dict[str, Any] = {}
    plain = {tensor, core.dtype, int, float, bool, str}

    def shared_block(cls: Any, element: Any, shape: Any) -> Any:
        sizes = tuple(size.value if type(size) is constexpr else size for size in shape)
        key = element.name, getattr(element, "address_space", None), sizes
        found = blocks.get(key)
        if found is None:
            found = object.__new__(cls)
            init_block(found, element, shape)
            blocks[key] = found
        return found

    def init_by_type(self: Any, handle: Any, dtype: Any) -> None:
        known = dtype.__dict__.get("_of_tensors")
        if known is None:
            init_tensor(self, handle, dtype)
            dtype._of_tensors = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, dtype
            self.shape, self.numel, self.dtype = known

    def broadcast_unless_alike(self: Any, left: Any, right: Any) -> Any:
        if left.shape.values == right.shape.values:
            return left, right
        return broadcast(self, left, right)

    def known_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    block.__new__, block.__init__ = shared_block, lambda self, element, shape: None
    tensor.__init__ = init_by_type
    core._unwrap_if_constexpr = lambda value: value if type(value) in plain else unwrap(value)
    semantic.broadcast_impl_value = broadcast_unless_alike
    interpreter._get_np_dtype = known_np_dtype
