"""A plan as the simulator plays it: what was measured with all ranks busy is not slowed by them a second time."""

import pytest

from meshwright.plan.predict import predict
from meshwright.plan.search import Fix
from meshwright.simulate.program import Backward, Forward, Reduce
from tests.plan.planned import planned


def test_collectives_of_ranks_that_share_cores_take_what_was_measured_and_kernels_wait_for_cores() -> None:
    plan = planned(Fix(data=4, tensor=1, pipeline=1, microbatches=2, remat="none"))
    (stage,) = plan.stages
    slowdown = plan.hardware.hosts[0].slowdown(4)
    assert slowdown > 1.5
    assert stage.reduce_seconds > 0
    seconds = {
        kind: next(
            event.end_seconds - event.start_seconds
            for event in predict(plan).timeline.events
            if isinstance(event.instruction, kind)
        )
        for kind in (Forward, Backward, Reduce)
    }
    assert seconds[Reduce] == pytest.approx(stage.reduce_seconds)
    computing = stage.forward_compute_seconds + stage.dispatch_seconds
    assert seconds[Forward] == pytest.approx(slowdown * computing + stage.forward_communication_seconds)
    computing = stage.backward_compute_seconds + stage.dispatch_seconds
    assert seconds[Backward] == pytest.approx(slowdown * computing + stage.backward_communication_seconds)


def test_a_pipeline_of_single_ranks_has_no_collectives_to_spare() -> None:
    plan = planned(Fix(data=1, tensor=1, pipeline=4, microbatches=4, remat="none"))
    assert all(stage.forward_communication_seconds == 0 for stage in plan.stages)
    assert predict(plan).predicted.iteration_seconds == plan.predicted.iteration_seconds
