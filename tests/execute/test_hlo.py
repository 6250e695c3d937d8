"""Collectives read from literal lines of HLO, as the CPU and GPU backends print them."""

import pytest

from meshwright.execute.hlo import Compiled, compiled_collectives

_LINES = [
    (
        "%r = f32[16,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
        [Compiled("all_reduce", 128, 4)],
    ),
    (
        "ROOT %r = bf16[] all-reduce(bf16[] %x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add",
        [Compiled("all_reduce", 1, 4)],
    ),
    (
        "%r = (f32[3,4]{1,0}, f32[5]{0}, /*index=2*/f32[]) all-reduce(%a, %b, %c), replica_groups=[1,8]<=[8]",
        [Compiled("all_reduce", 12, 8), Compiled("all_reduce", 5, 8), Compiled("all_reduce", 1, 8)],
    ),
    (
        "%g = f32[512,64]{0,1} all-gather(%p), replica_groups=mesh['a'=1,'b'=4], device_ids=([2,4]T(1,0)) {'b'}",
        [Compiled("all_gather", 512 * 64, 4)],
    ),
    (
        '%t = (f32[1,4]{1,0}, f32[1,4]{1,0}) all-to-all(%a, %b), replica_groups={{0,1}}, metadata={op_name="f/add"}',
        [Compiled("all_to_all", 8, 2, "f/add")],
    ),
    (
        "%s = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}",
        [Compiled("all_gather", 64, 4)],
    ),
    ("%d = f32[8,8]{1,0} all-gather-done(%s)", []),
    (
        "%s = f32[8]{0} all-reduce-start(%a), replica_groups={{0,1,2,3}}, to_apply=%add",
        [Compiled("all_reduce", 8, 4)],
    ),
    (
        "%s = f32[2,8]{1,0:T(8,128)} reduce-scatter(%a), replica_groups={{0,1,2,3}}, dimensions={0}",
        [Compiled("reduce_scatter", 16, 4)],
    ),
    (
        "%p = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}",
        [Compiled("permute", 6, 2)],
    ),
    ("%r = f32[4]{0} all-reduce(%x), replica_groups={{0},{1},{2}}, to_apply=%add", []),
    ("%f = f32[4]{0} fusion(%all-reduce.3), kind=kLoop, calls=%all-reduce_fusion", []),
]


@pytest.mark.parametrize(("line", "expected"), _LINES, ids=[line.split("(%")[0][:60] for line, _ in _LINES])
def test_a_line_of_hlo_is_read(line: str, expected: list[Compiled]) -> None:
    assert list(compiled_collectives(line)) == expected


def test_a_module_is_read_line_by_line() -> None:
    text = "HloModule m\n\nENTRY %main {\n  " + "\n  ".join(line for line, _ in _LINES) + "\n}\n"
    assert list(compiled_collectives(text)) == [c for _, expected in _LINES for c in expected]
