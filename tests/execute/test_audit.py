"""What is compiled is what was priced: a small GPT as one stage on eight fake devices."""

import pytest

from experiments.compiled_collectives import Subject
from meshwright.execute.audit import Comparison, compare, deviation
from meshwright.plan.priced import Priced


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text

    def as_text(self) -> str:
        return self.text


class _Programs:
    def __init__(self, forward: str = "", backward: str = "", reduce: str = "") -> None:
        self.forward, self.backward, self.reduce = _Text(forward), _Text(backward), _Text(reduce)


@pytest.fixture(scope="module")
def gpt() -> Subject:
    # Wide enough that splitting pays on the machine that is priced; it is compiled, never run.
    return Subject("gpt:layers=2,hidden=1024,heads=16,vocab=8192,seq=512,tied=false", 64, 2)


def _agree(rows: tuple[Comparison, ...]) -> None:
    for row in rows:
        assert row.compiled_elements == pytest.approx(row.priced_elements, rel=0.1), row


def test_data_parallelism_sums_every_gradient_once_per_iteration(gpt: Subject) -> None:
    rows = gpt.compare((8,), ("data",))
    _agree(rows)
    parameters = gpt.traced.graph.parameter_count
    assert [row for row in rows if row.phase != "forward"] == [
        Comparison("once", "all_reduce", parameters, parameters),
    ]  # in the forward half there is the loss, one number


def test_tensor_parallelism_sums_two_activations_per_layer(gpt: Subject) -> None:
    """One sum after attention, one after the feed-forward. Source: Shoeybi et al., Megatron-LM (2019), section 3."""
    rows = gpt.compare((8,), ("tensor",))
    _agree(rows)
    forward = {row.kind: row.compiled_elements for row in rows if row.phase == "forward"}
    assert forward == {"all_reduce": pytest.approx(2 * 2 * 32 * 512 * 1024, rel=0.01)}


def test_a_sum_over_two_axes_is_one_all_reduce(gpt: Subject) -> None:
    _agree(gpt.compare((2, 4), ()))  # left free, a GPT this small is split by samples over both


def test_a_gpt_on_two_axes_compiles_to_what_it_was_priced_for(gpt: Subject) -> None:
    rows = gpt.compare((2, 4), ("data", "tensor"))
    _agree(rows)
    assert {row.phase for row in rows} == {"forward", "backward", "once"}


def test_a_reduce_scatter_counts_as_the_all_reduce_that_was_priced() -> None:
    priced = [Priced("all_reduce", 64.0, 256.0, (0,), 4, "once", 1e-6, "a gradient")]
    programs = _Programs(reduce="%s = f32[16]{0} reduce-scatter(%a), replica_groups={{0,1,2,3}}, dimensions={0}")
    assert compare(priced, programs) == (Comparison("once", "all_reduce", 64.0, 64.0),)  # type: ignore[arg-type]


def test_what_was_not_priced_shows() -> None:
    programs = _Programs(forward="%g = f32[8]{0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}")
    rows = compare([], programs)  # type: ignore[arg-type]
    assert rows == (Comparison("forward", "all_gather", 0.0, 8.0),)
    assert deviation(rows) == float("inf")
