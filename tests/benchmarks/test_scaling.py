import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main as dispatch
from benchmarks.scaling import (
    PUBLISHED,
    Hop,
    Layer,
    computing,
    hiding_length,
    read_cluster,
    ring,
    ring_bytes,
    ring_hops,
    ring_seconds,
    speed_at,
    ulysses,
    ulysses_bytes,
    window_hops,
)
from flashlayer.distributed.layout import make_layout, visited_hops
from tests.distributed.measures import expected_traffic


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_are_those_that_the_ranks_were_seen_to_send(ranks: int) -> None:
    layer, length = Layer(heads=2 * ranks, kv_heads=ranks, head_dim=8), 8 * ranks
    counted = expected_traffic(ranks)
    for call, hops in (("ring", ranks), ("window", 2), ("own shard", 1)):
        assert [*ring_bytes(layer, length, hops)] == counted[call]
    assert [*ulysses_bytes(layer, length, ranks)] == counted["ulysses"]


@pytest.mark.parametrize("window", [None, 0, 1, 63, 64, 65, 200, 10_000])
def test_a_window_ends_the_ring_where_the_layer_does(window: int | None) -> None:
    layout = make_layout((64,) * 8, "contiguous")
    assert window_hops(8, 64, window) == len(visited_hops(layout, window, 0))


def simulated(hop: Hop, hops: int, *, backward: bool) -> float:
    """The order of ``Ring.hops`` and ``RingGradient.forward``: one link, one device."""
    now = link = 0.0  # when the device, and when the link, has done all it was given
    sums_there = 0.0
    for index in range(hops):
        keys_there = 0.0
        if index < hops - 1:
            link = keys_there = max(link, now) + hop.keys
        now += hop.own if index == 0 else hop.other
        now = max(now, sums_there, keys_there)
        if backward and hops > 1:
            link = sums_there = max(link, now) + hop.sums
    return max(now, sums_there)


@pytest.mark.parametrize("hops", [1, 2, 3, 8])
@pytest.mark.parametrize("speeds", [(4, 3, 1, 1), (4, 3, 2, 2), (1, 3, 2, 5), (1, 1, 9, 9)])
def test_seconds_of_a_ring_are_those_of_its_steps(
    hops: int, speeds: tuple[float, float, float, float]
) -> None:
    hop = Hop(*speeds)
    forward = hop._replace(sums=0)
    assert ring_seconds(forward, hops) == simulated(forward, hops, backward=False)
    assert ring_seconds(hop, hops) == simulated(hop, hops, backward=True)


def test_speeds_between_two_lengths_and_beyond() -> None:
    speeds = {512: 1.0, 2048: 3.0}
    found = [speed_at(speeds, length) for length in (1, 512, 1024, 2048, 10**6)]
    assert found == pytest.approx([1, 1, 2, 3, 3])


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("ranks", [8, 16])
def test_from_its_length_on_a_ring_hides_its_messages(phase: str, ranks: int) -> None:
    layer = Layer()
    length = hiding_length(layer, PUBLISHED, ranks, phase)
    for tried, hidden in ((length, True), (length // 2, False)):
        hop = ring_hops(layer, PUBLISHED, tried, ranks)[phase == "backward"]
        assert (hop.keys + hop.sums <= hop.other) is hidden
    # Fewer kv heads, less to send.
    assert hiding_length(replace(layer, kv_heads=64), PUBLISHED, ranks, phase) > length


def test_a_ring_that_hides_everything_takes_as_long_as_it_computes() -> None:
    taken, alone = (f(Layer(), PUBLISHED, 65536, 8) for f in (ring, computing))
    assert taken.forward == alone.forward
    assert alone.backward < taken.backward < 1.01 * alone.backward  # the last sums' way home
    assert ulysses(Layer(), PUBLISHED, 65536, 8) is not None
    assert ulysses(Layer(), PUBLISHED, 65536, 16) is None


def test_the_page_and_the_plot_from_measured_speeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = tmp_path / "cluster.json"
    measured.write_text(json.dumps(asdict(replace(PUBLISHED, source="a test", far=25e9))))
    assert read_cluster(measured).causal == PUBLISHED.causal
    assert dispatch(["scaling", "--measured", str(measured), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "scaling.md").read_text()
    assert "Speeds: a test." in page
    assert "| between nodes, forward | 25 GB/s | 8,192 |" in page
    assert "| 1,048,576 | 1,024 | 1,024 |" in page
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    measured.write_text('{"causal": {}}')
    with pytest.raises(SystemExit):
        dispatch(["scaling", "--measured", str(measured)])
    assert "does not hold a cluster" in capsys.readouterr().err
