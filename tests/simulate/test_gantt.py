"""Pictures hold what they say: the shares of their colours are the shares of time, at every size."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from meshwright.errors import ScheduleError
from meshwright.simulate.bare import StageTimes, play
from meshwright.simulate.boxes import COLOURS, KINDS, boxes_of
from meshwright.simulate.density import highest, painted
from meshwright.simulate.gantt import _facts, plot_timeline, plot_timelines
from meshwright.simulate.program import Backward, Forward, Receive, Reduce
from meshwright.simulate.schedules.base import Options
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.timeline import Event, Timeline


def share_of(kind: str, path: Path) -> float:
    """Share of the picture's pixels that have a colour."""
    code = next(colour for name, colour in COLOURS.values() if name == kind)
    colour = [int(code[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    pixels = imread(path)[..., :3]
    return float((abs(pixels - colour).max(axis=-1) < 0.01).mean())


def test_a_picture_shows_backward_twice_as_long_as_forward(tmp_path: Path) -> None:
    plot_timeline(play("gpipe", 4, 4), tmp_path / "gantt.png")
    assert share_of("backward", tmp_path / "gantt.png") / share_of("forward", tmp_path / "gantt.png") == pytest.approx(
        2, rel=0.05
    )


def test_the_halves_of_a_backward_have_colours_of_their_own(tmp_path: Path) -> None:
    plot_timeline(play("zb-h1", 4, 8, StageTimes(1, 2, 1)), tmp_path / "zb.png")
    halves = share_of("input gradient", tmp_path / "zb.png"), share_of("weight gradient", tmp_path / "zb.png")
    assert halves[0] / halves[1] == pytest.approx(2, rel=0.1)
    assert share_of("backward", tmp_path / "zb.png") == 0


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_can_be_drawn(schedule: str, tmp_path: Path) -> None:
    timeline = play(schedule, 4, 8, hop_seconds=0.1, options=Options())
    plot_timeline(timeline, tmp_path / "x.png", schedule, memory=True)
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 3), (64, 64), (512, 8), (700, 4)])
def test_pictures_of_all_sizes_have_a_size_that_fits_a_screen(stages: int, microbatches: int, tmp_path: Path) -> None:
    timeline = play("gpipe", stages, microbatches)
    plot_timelines([("predicted", timeline)], tmp_path / "x.png", memory=True)
    height, width = imread(tmp_path / "x.png").shape[:2]
    assert width == 1690
    assert 200 < height < 1500


def test_density_tells_the_bubble_of_thousands_of_boxes(tmp_path: Path) -> None:
    """GPipe's 16 × 2000 boxes are each far below a pixel; half its forwards' time is as blue as ever."""
    timeline = play("gpipe", 16, 2000)
    plot_timeline(timeline, tmp_path / "x.png")
    blue, orange = share_of("forward", tmp_path / "x.png"), share_of("backward", tmp_path / "x.png")
    assert orange / blue == pytest.approx(2, rel=0.05)
    assert blue > 0.15


def test_later_stages_of_a_mesh_are_paler() -> None:
    boxes = boxes_of(play("interleaved", 2, 4, options=Options(chunks=2)))
    assert set(boxes.pale.tolist()) == {0.0, 0.5}
    assert not boxes_of(play("1f1b", 2, 4)).pale.any()


def test_waits_and_what_takes_no_time_have_no_box() -> None:
    events = (
        Event(0, Forward(0, 0), 0, 2),
        Event(0, Receive(0, 1, "cotangent", 0), 2, 3),
        Event(0, Backward(0, 0), 3, 5),
        Event(0, Reduce(0), 4, 5),
        Event(0, Reduce(1), 5, 5),
    )
    boxes = boxes_of(Timeline(((0,),), events))
    assert [KINDS[kind] for kind in boxes.kind.tolist()] == [Forward, Backward, Reduce]
    assert boxes.beside.tolist() == [False, False, True]


@given(
    st.lists(st.floats(0.0, 1.0), min_size=2, max_size=60).map(sorted),
    st.integers(1, 40),
)
def test_painting_keeps_the_mean_whatever_the_widths(cuts: list[float], columns: int) -> None:
    """Boxes between every other pair of cuts: the mean of the image is the share of time that they take."""
    edges = np.array(cuts[: len(cuts) // 2 * 2]).reshape(-1, 2) * columns
    start, end = edges[:, 0], edges[:, 1]
    image = painted(
        (1, columns), np.zeros(len(edges), np.int64), start, end, np.zeros((len(edges), 3)), np.ones((1, columns, 3))
    )
    assert image.mean() == pytest.approx(1 - (end - start).sum() / columns, abs=1e-9)
    for column in range(columns):
        covered = np.clip(np.minimum(end, column + 1) - np.maximum(start, column), 0, None).sum()
        assert image[0, column, 0] == pytest.approx(1 - covered, abs=1e-9)


def test_boxes_that_overlap_share_their_place() -> None:
    red, blue = np.array([[1.0, 0, 0]]), np.array([[0, 0, 1.0]])
    image = painted(
        (1, 2), np.zeros(2, np.int64), np.zeros(2), np.array([2.0, 1.0]), np.vstack([red, blue]), np.ones((1, 2, 3))
    )
    assert image[0].tolist() == [[0.5, 0, 0.5], [1, 0, 0]]


def test_no_peak_is_lost_between_columns() -> None:
    """A step that lasts a millionth still shows; a level holds until the next step."""
    seconds, held = np.array([0.0, 0.5, 0.500001]), np.array([1.0, 9.0, 2.0])
    assert highest(4, seconds, held, 1.0).tolist() == [1, 1, 9, 2]


@pytest.mark.parametrize(("name", "message"), [("x.exe", "'exe' is no kind"), ("x", "'no ending' is no kind")])
def test_a_path_that_is_no_picture_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=message):
        plot_timeline(play("1f1b", 2, 2), tmp_path / name)


def test_nothing_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="cannot be drawn"):
        plot_timelines([], tmp_path / "x.png")


def test_a_bare_schedule_holds_activations_not_bytes() -> None:
    timeline = play("1f1b", 4, 8)
    assert "peak 4 activations on mesh 0" in _facts(timeline, None, 1.0, "s", "activations")
    assert "peak 4 B on mesh 0" in _facts(timeline, None, 1.0, "s", "bytes")
