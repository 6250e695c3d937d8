"""``mark_layer``: the model says itself where a layer ends, where the planner's own cuts are not the wanted ones."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from meshwright.plan.layers import MARKER

_mark_p = Primitive(MARKER)


def mark_layer(x: Any) -> Any:
    """``x`` unchanged; the layer that computes it ends here.

    Put it on what flows from one block of the model to the next. A model with marks is cut at its marks alone.
    """
    return jax.tree.map(_mark_p.bind, x)


_mark_p.def_impl(lambda x: x)
_mark_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_mark_p, lambda context, x: [x])
ad.deflinear2(_mark_p, lambda cotangent, x: [cotangent])
batching.defvectorized(_mark_p)
