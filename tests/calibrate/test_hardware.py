"""Clusters as data: what is impossible is refused in one line that names the place in the file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.calibrate.hardware import (
    COLLECTIVE_KINDS,
    CollectiveFit,
    Quantity,
    cluster_from_data,
    cluster_to_data,
    load_cluster,
    parse_cluster,
    save_cluster,
    shipped_machines,
)
from meshwright.errors import ClusterError


def data_of(machine: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(cluster_to_data(parse_cluster(machine))))
    return data


def put(data: dict[str, Any], path: str, value: object) -> None:
    """Set ``hosts.0.device.name``-like paths in JSON data."""
    *way, last = path.split(".")
    place: Any = data
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[last] = value


def test_the_five_machines_of_the_contract_are_shipped() -> None:
    clouds = {"g5.48xlarge", "g6.48xlarge", "p3.16xlarge", "p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge"}
    systems = {"dgx-a100", "dgx-a100-40gb", "dgx-h100", "dgx-h200", "gh200", "gh200-ndr", "selene", "v100-32gb"}
    cards = {"cpu", "h100", "rtx-2080ti", "rtx-3090", "titan-rtx"}
    assert set(shipped_machines()) == clouds | systems | cards | {"dgx-a100-25gbe", "dgx-h100-100gbe"}


@pytest.mark.parametrize(
    ("spec", "hosts", "devices"),
    [
        ("p3.16xlarge:8", 8, 64),
        ("dgx-a100:16", 16, 128),
        ("dgx-h100", 1, 8),
        ("h100:1", 1, 1),
        ("h100:3", 3, 3),
        ("cpu:4", 1, 4),
        ("dgx-a100:2+dgx-h100:2", 4, 32),
        (" dgx-a100:1 + h100:2 ", 3, 10),
    ],
)
def test_a_count_is_of_hosts_and_for_shared_cores_of_devices(spec: str, hosts: int, devices: int) -> None:
    cluster = parse_cluster(spec)
    assert (len(cluster.hosts), cluster.devices) == (hosts, devices)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("dgxa100:2", "did you mean 'dgx-a100'"),
        ("dgx-a100:1000000000", "more than 262,144 devices"),
        ("abacus", "shipped are cpu, dgx-a100, dgx-a100-25gbe, dgx-a100-40gb"),
        ("", "shipped are"),
        ("cpu:0", "use a whole number, as in cpu:2"),
        ("cpu:-1", "use a whole number"),
        ("cpu:²", "use a whole number"),
        ("cpu:", "use a whole number"),
        ("h100:two", "use a whole number"),
        ("nowhere.json", "nowhere.json: cannot be read"),
        ("nowhere.json:4", "nowhere.json: cannot be read"),
    ],
)
def test_a_wrong_spec_is_one_line_that_says_what_to_use(spec: str, says: str) -> None:
    with pytest.raises(ClusterError) as caught:
        parse_cluster(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (
            "hosts.0.device.memory_bytes.value",
            -1,
            "hosts[0].device.memory_bytes.value is -1; a positive number is needed",
        ),
        (
            "hosts.0.device.memory_bytes.value",
            float("nan"),
            "hosts[0].device.memory_bytes.value is nan; a finite number",
        ),
        (
            "hosts.0.device.memory_bytes.value",
            float("inf"),
            "hosts[0].device.memory_bytes.value is inf; a finite number",
        ),
        ("hosts.0.device.memory_bytes.value", True, "hosts[0].device.memory_bytes.value: expected `float`, got `bool`"),
        (
            "hosts.0.device.memory_bytes.value",
            "80 GB",
            "hosts[0].device.memory_bytes.value: expected `float`, got `str`",
        ),
        ("hosts.0.device.memory_bytes.source", " ", "hosts[0].device.memory_bytes.source is empty"),
        ("hosts.0.device.launch_seconds.value", -1e-6, "hosts[0].device.launch_seconds.value is -1e-06; zero or"),
        ("hosts.0.device.launch_seconds.low", 1.0, "hosts[0].device.launch_seconds.low is 1, above the value"),
        ("hosts.0.device.launch_seconds.high", 0.0, "hosts[0].device.launch_seconds.high is 0, below the value"),
        ("hosts.0.device.matmul_efficiency.value", 0, "hosts[0].device.matmul_efficiency"),
        ("hosts.0.device.flops_per_second", {}, "hosts[0].device.flops_per_second has no 'f32'"),
        ("hosts.0.device.memory_gigabytes", 80, "hosts[0].device has the unknown field `memory_gigabytes`; remove it"),
        ("inter_host.bytes_per_second.value", -2e9, "inter_host.bytes_per_second.value is -2e+09; a positive number"),
        ("hosts.0.link.collectives.gossip", [], "hosts[0].link.collectives.gossip is not a collective; known are"),
        ("hosts.0.device.flops_per_second.s8.value", -1, "hosts[0].device.flops_per_second.s8.value is -1; a positive"),
        (
            "hosts.0.device.flops_per_second.f64.value",
            "x",
            "hosts[0].device.flops_per_second.f64.value: expected `float`",
        ),
        ("hosts.0.link.collectives.all_reduce.0.ranks", 1, "hosts[0].link.collectives.all_reduce[0].ranks is 1"),
        ("hosts.0.devices", 0, "hosts[0].devices is 0; at least 1 is needed"),
        ("hosts.0.cores", 0, "hosts[0].cores is 0; at least 1 is needed"),
        ("hosts.0.count", 0, "hosts[0].count is 0; at least 1 is needed"),
        ("hosts.0.count", 10**9, "hosts[0].count 1000000000 of hosts with 8 devices is more than 262,144 devices"),
        ("hosts", [], "hosts is empty"),
        ("inter_host.latency_seconds.value", -1, "inter_host.latency_seconds.value is -1; zero or a positive"),
        ("inter_host", None, "inter_host: expected `object`, got `null`"),
        ("colour", "red", "the file has the unknown field `colour`"),
        ("format", "yaml", 'format is not "meshwright-cluster"'),
        ("version", 2, "version is 2, newer than 1, the last that this Meshwright reads; update Meshwright"),
        ("version", 0, "version is 0, older than 1, the first that this Meshwright reads; run `meshwright calibrate`"),
        ("version", None, "version is None; a whole number is needed, now 1"),
        ("version", "1", "version is '1'; a whole number is needed, now 1"),
        ("hosts.0.device.matmul.bf16.efficiency.256x128", 1.2, "hosts[0].device.matmul.bf16.efficiency.256x128"),
        (
            "hosts.0.device.memory_bytes_per_second.value",
            2.6e12,
            "hosts[0].device.memory_bytes_per_second.value is 2.6e+12, 28% above the 2.039e+12 of the data",
        ),
        (
            "hosts.0.device.matmul.bf16.memory_bytes_per_second",
            2.6e12,
            "hosts[0].device.matmul.bf16.memory_bytes_per_second is 2.6e+12, 28% above the 2.039e+12 of the data sheet",
        ),
        ("hosts.0.device.sheet_memory_bytes_per_second.value", 0, "hosts[0].device.sheet_memory_bytes_per_second"),
        (
            "hosts.0.link.bytes_per_second",
            {"value": 6e11, "source": "GB taken for Gbit"},
            "hosts[0].link.bytes_per_second.value is 6e+11, 100% above the 3e+11 of the data sheet; check the unit",
        ),
        (
            "hosts.0.link.collectives.all_reduce.2.bytes_per_second.value",
            1e12,
            "hosts[0].link.collectives.all_reduce (bus bandwidth of 8 ranks) is 1.75e+12, 483% above the 3e+11 of",
        ),
        (
            "hosts.0.link.sheet_bytes_per_second.value",
            -1,
            "hosts[0].link.sheet_bytes_per_second.value is -1; a positive",
        ),
        ("hosts.0.price_per_hour", {"usd": 0, "date": "2026-11-09", "source": "x"}, "hosts[0].price_per_hour.usd is 0"),
        (
            "hosts.0.price_per_hour",
            {"usd": 32, "date": "last week", "source": "x"},
            "hosts[0].price_per_hour.date is 'last week'; write it as 2026-11-09",
        ),
        (
            "hosts.0.price_per_hour",
            {"usd": 32, "date": "2026-11-09", "source": ""},
            "hosts[0].price_per_hour.source is",
        ),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_place(tmp_path: Path, path: str, value: object, says: str) -> None:
    data = data_of("dgx-a100")
    put(data, path, value)
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ClusterError) as caught:
        load_cluster(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: {says}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "format is not"),
        ('{"format": "meshwright-cluster", "format": "meshwright-cluster"}', "field 'format' is written twice"),
    ],
)
def test_what_is_no_machine_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(text)
    with pytest.raises(ClusterError, match=says):
        load_cluster(file)


@given(st.lists(st.sampled_from(["p3.16xlarge", "dgx-a100", "dgx-h100", "h100", "cpu"]), min_size=1, max_size=4))
def test_the_text_form_of_any_sum_comes_back_equal(names: list[str]) -> None:
    cluster = parse_cluster("+".join(f"{name}:{index + 1}" for index, name in enumerate(names)))
    assert cluster_from_data(json.loads(json.dumps(cluster_to_data(cluster)))) == cluster


def test_equal_hosts_are_written_once_and_a_file_takes_a_count(tmp_path: Path) -> None:
    file = tmp_path / "eight.json"
    save_cluster(parse_cluster("p3.16xlarge:8"), file)
    assert [group["count"] for group in json.loads(file.read_text())["hosts"]] == [8]
    assert parse_cluster(str(file)).devices == 64
    assert parse_cluster(f"{file}:4").devices == 32


def test_a_count_on_unequal_hosts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mixed.json"
    save_cluster(parse_cluster("dgx-a100:1+dgx-h100:1"), file)
    with pytest.raises(ClusterError, match="unequal hosts"):
        parse_cluster(f"{file}:2")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "machine.json"
    save_cluster(parse_cluster("cpu:2"), file)
    before = file.read_bytes()

    def interrupted(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_cluster(parse_cluster("cpu:4"), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_devices_are_numbered_host_by_host() -> None:
    cluster = parse_cluster("h100:2+dgx-a100:1")
    assert [cluster.host_of(index) for index in range(10)] == [0, 1] + [2] * 8
    assert cluster.device(0).name.startswith("H100")
    assert cluster.device(9).name.startswith("A100")
    assert cluster.devices_per_host == 1
    for outside in (-1, 10):
        with pytest.raises(ClusterError, match=r"which has 0\.\.9"):
            cluster.host_of(outside)


def test_a_group_inside_a_host_uses_its_link_and_any_other_the_network() -> None:
    cluster = parse_cluster("dgx-a100:2")
    assert cluster.link([0, 7]) is cluster.hosts[0].link
    assert cluster.link([7, 8]) is cluster.inter_host


def test_the_parts_of_a_sum_are_joined_by_the_slower_network() -> None:
    mixed = parse_cluster("p3.16xlarge:1+dgx-h100:1").inter_host
    slow = parse_cluster("p3.16xlarge").inter_host
    assert mixed.bytes_per_second == slow.bytes_per_second
    assert mixed.host_bytes_per_second == slow.host_bytes_per_second
    assert mixed.latency_seconds == slow.latency_seconds


def test_ranks_of_a_cpu_host_divide_its_memory_and_its_cores() -> None:
    one, four = (parse_cluster(spec).hosts[0] for spec in ("cpu:1", "cpu:4"))
    assert four.device.memory_bytes.value == pytest.approx(one.device.memory_bytes.value / 4)
    assert four.cores == one.cores
    assert one.slowdown(1) == four.slowdown(1) == 1.0
    assert four.slowdown(4) >= 4 / four.cores
    assert parse_cluster("dgx-a100").hosts[0].slowdown(8) == 1.0


def test_dtypes_go_by_either_name_and_unknown_ones_run_as_f32() -> None:
    v100 = parse_cluster("p3.16xlarge").device(0)
    assert v100.peak_flops("float16") == v100.peak_flops("f16") == 125e12
    assert v100.peak_flops("bfloat16") == v100.peak_flops("f32") == 15.7e12
    assert parse_cluster("dgx-h100").device(0).peak_flops("bfloat16") == 989e12


@pytest.mark.parametrize("machine", shipped_machines())
def test_every_shipped_collective_grows_with_its_message(machine: str) -> None:
    for kind in COLLECTIVE_KINDS:
        for fit in parse_cluster(machine).hosts[0].link.collectives.get(kind, ()):
            assert fit.seconds(1 << 30) > fit.seconds(1 << 10) > 0


def test_the_price_of_a_cluster_is_that_of_its_hosts_and_unknown_where_one_is() -> None:
    assert parse_cluster("p4d.24xlarge:4").usd_per_hour == pytest.approx(4 * 21.957642)
    assert parse_cluster("dgx-a100:4").usd_per_hour is None
    assert parse_cluster("p4d.24xlarge:1+dgx-a100:1").usd_per_hour is None


def test_the_bus_bandwidth_of_a_ring_is_what_each_device_sends() -> None:
    """8 devices, 2 * 7/8 of the array each in an all-reduce, 7/8 in a gather, 7/64 in an all-to-all."""
    rate = Quantity(8e9, "made")
    fit = CollectiveFit(ranks=8, latency_seconds=Quantity(0, "made"), bytes_per_second=rate)
    found = [fit.bus_bytes_per_second(kind) for kind in ("all_reduce", "all_gather", "all_to_all", "permute")]
    assert found == [14e9, 7e9, 0.875e9, 1e9]


def test_reading_a_cluster_needs_neither_jax_nor_mpi_nor_scipy() -> None:
    code = (
        "import sys; from meshwright.calibrate.hardware import parse_cluster; parse_cluster('cpu:4');"
        "print([name for name in ('jax', 'mpi4py', 'scipy', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
