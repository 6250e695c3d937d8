"""When two functions inside equations are surely the same one, as those of custom derivatives often are.

JAX wraps the functions of a ``custom_vjp`` anew at each call. Two wraps are the same if they hold the same functions,
closed over equal values. What the wraps look like inside is not promised by JAX: anything that is not recognised makes
the answer "not surely", and the layer is then differentiated by itself, which is slower and never wrong.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.dtype, type, jax.tree_util.PyTreeDef)
# Cells of JAX's own wraps that hold caches, results to come and the trace at work, not what is computed.
_JAX_CELLS = frozenset({"cells", "sentinel", "self", "out_store"})
_DEPTH = 12  # wraps in wraps; deeper ones are not looked into


def function_text(function: Any) -> str | None:
    """A text that two functions share only if they compute the same; None if that cannot be told.

    It holds addresses: compare texts of functions that are alive together, and keep none.
    """
    return _text(function, _DEPTH)


def functions_in(value: Any) -> Iterator[Any]:
    """The functions that a parameter of an equation holds: itself, or those in the equations of its programs."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from functions_in(part)
    elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        for eqn in getattr(value, "jaxpr", value).eqns:
            for parameter in eqn.params.values():
                yield from functions_in(parameter)
    elif hasattr(value, "call_wrapped") or (callable(value) and not isinstance(value, type)):
        yield value


def _text(value: Any, depth: int) -> str | None:
    if depth == 0:
        return None
    if isinstance(value, _PLAIN) or type(value).__name__ == "ShapedArray":
        return f"{type(value).__name__}:{value!r}"
    if type(value).__name__ == "DebugInfo":
        return "names"
    if isinstance(value, (tuple, list)):
        return _all(value, depth)
    if type(value).__name__ == "Unhashable":
        return _text(value.val, depth - 1)
    if hasattr(value, "transforms") and hasattr(value, "f"):  # a wrapped function
        return _all((value.f, *value.transforms), depth)
    if hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        return _all((value.func, value.args, tuple(sorted(value.keywords.items()))), depth)
    if hasattr(value, "__code__"):
        return _closure_text(value, depth)
    return None


def _all(values: Sequence[Any], depth: int) -> str | None:
    texts = [_text(v, depth - 1) for v in values]
    return None if None in texts else f"({','.join(map(str, texts))})"


def _closure_text(function: Any, depth: int) -> str | None:
    """Code, globals, defaults and what the function closes over."""
    code = function.__code__
    of_jax = function.__module__.startswith("jax.")
    cells = []
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if of_jax and name in _JAX_CELLS:
            continue
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not yet filled
            return None
    defaults = (function.__defaults__ or (), tuple(sorted((function.__kwdefaults__ or {}).items())))
    closed = _all((*cells, *defaults), depth)
    return None if closed is None else f"code {id(code)} globals {id(function.__globals__)} {closed}"
