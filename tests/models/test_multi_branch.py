"""A trunk, branches that share nothing but it, and their mean."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.models import multi_branch
from tests.models.training import compiled, drawn, losses_of_steps, random_batch

TINY = multi_branch.MultiBranchConfig(branches=3, layers=1, trunk=1, after=1, hidden=16, features=12, targets=4, ffn=2)
MODEL = multi_branch.build(TINY, "tiny")


def test_it_learns() -> None:
    losses = losses_of_steps(MODEL, drawn(multi_branch.weights(TINY)), random_batch(MODEL, 8, 16), steps=10, rate=0.3)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]


def test_branches_that_are_silent_leave_the_trunk_alone() -> None:
    """A residual branch whose last kernel is 0 gives what it reads; the order of branches makes no difference."""
    params, batch = drawn(multi_branch.weights(TINY)), random_batch(MODEL, 4, 16)
    answers = compiled(partial(multi_branch.answers, TINY))
    silent = {**params, "branches": jax.tree.map(jnp.zeros_like, params["branches"])}
    bare = {**params, "branches": [[] for _ in range(3)]}
    np.testing.assert_allclose(
        answers(silent, batch["features"]), compiled(partial(multi_branch.answers, TINY))(bare, batch["features"]),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    turned = {**params, "branches": params["branches"][::-1]}
    np.testing.assert_allclose(
        answers(turned, batch["features"]), answers(params, batch["features"]), rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(answers(silent, batch["features"]), answers(params, batch["features"]), atol=1e-6)
