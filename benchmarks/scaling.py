"""When a ring hides its traffic: a model of attention over many GPUs, from a few speeds.

    python -m benchmarks scaling
    python -m benchmarks scaling --measured my_cluster.json

Writes ``scaling.json``, ``scaling.md`` and ``scaling.png`` into ``--out``. No GPU is needed, and
without ``--measured`` no speed in it is measured: :data:`PUBLISHED` has the sources. Every formula
is explained in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plots
from train import UsageError
from train.proof.report import table

MIB = 2**20
TERA = 1e12


@dataclass(frozen=True)
class Layer:
    """One causal attention layer of one sequence."""

    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2  # bytes of q, k, v and o
    sum_itemsize: int = 4  # bytes of the travelling sums of dK and dV


@dataclass(frozen=True)
class Cluster:
    """What the GPUs and their links do.

    Attributes:
        source: where the numbers are from.
        causal: FLOP/s of a forward pass by sequence length, with the causal mask.
        full: likewise without a mask.
        backward: FLOP/s of a backward pass.
        near: bytes a second that a GPU sends to another in its node.
        far: likewise to another node.
        node: GPUs in a node.
        latency: seconds that a message takes besides.
    """

    source: str
    causal: dict[int, float]
    full: dict[int, float]
    backward: dict[int, float]
    near: float
    far: float
    node: int
    latency: float

    def link(self, ranks: int) -> float:
        """Bytes a second of the slowest link in a ring, which all wait for at every hop."""
        return self.near if ranks <= self.node else self.far


def _teraflops(short: float, middle: float, long: float) -> dict[int, float]:
    return {512: short * TERA, 2048: middle * TERA, 16384: long * TERA}


PUBLISHED = Cluster(
    source=(
        "published, not measured by this project: FlashAttention-3 on an H100 SXM, bf16, D = 128, "
        "by sequence length (Shah et al., arXiv 2407.08608); NVLink 4, 900 GB/s "
        "per GPU in both directions together, and one 400 Gb/s InfiniBand port per GPU (NVIDIA's "
        "data sheets of the H100 and the DGX H100). The latency of 10 microseconds is an "
        "assumption"
    ),
    causal=_teraflops(292, 521, 616),
    full=_teraflops(467, 625, 648),
    backward=_teraflops(316, 501, 561),
    near=450e9,
    far=50e9,
    node=8,
    latency=10e-6,
)


def speed_at(speeds: dict[int, float], length: float) -> float:
    """FLOP/s at a length: between two that are known, along the logarithm; beyond, the last."""
    lengths = sorted(speeds)
    place = bisect.bisect(lengths, length)
    if place in (0, len(lengths)):
        return speeds[lengths[min(place, len(lengths) - 1)]]
    low, high = lengths[place - 1 : place + 1]
    share = math.log(length / low) / math.log(high / low)
    return speeds[low] + share * (speeds[high] - speeds[low])


def ring_bytes(layer: Layer, length: int, hops: int) -> tuple[float, float]:
    """What a rank with ``length`` positions sends, forward and backward: ``ring_attention``'s."""
    elements = layer.kv_heads * length * 2 * layer.head_dim
    keys = (hops - 1) * elements * layer.itemsize
    sums = hops * elements * layer.sum_itemsize if hops > 1 else 0
    return keys, keys + sums


def ulysses_bytes(layer: Layer, length: int, ranks: int) -> tuple[float, float]:
    """What a rank sends, forward and backward: ``ulysses_attention``'s."""
    elements = length * 2 * (layer.heads + layer.kv_heads) * layer.head_dim
    sent = (ranks - 1) / ranks * elements * layer.itemsize
    return sent, sent


def window_hops(ranks: int, length: int, window: int | None) -> int:
    """Hops of a contiguous, causal ring: those to the ranks that the window reaches."""
    return ranks if window is None else min(ranks, 1 + math.ceil(window / length))


class Phases(NamedTuple):
    """Seconds of a forward and of a backward pass."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """One after the other."""
        return self.forward + self.backward


class Hop(NamedTuple):
    """Seconds of one phase of a ring: the own shard's, another's, and the messages."""

    own: float
    other: float
    keys: float
    sums: float = 0.0  # of dK and dV; only backward


def ring_seconds(hop: Hop, hops: int) -> float:
    """A phase in which messages travel while a rank computes, as in ``Ring.hops``.

    While the own shard is computed the first keys arrive; then, at every hop, the next keys and,
    backward, the sums of the hop before; at the last hop only those; the last sums, at the end,
    meet no computation.
    """
    if hops == 1:
        return hop.own
    middle = max(hop.other, hop.keys + hop.sums)
    return max(hop.own, hop.keys) + (hops - 2) * middle + max(hop.other, hop.sums) + hop.sums


def ring_hops(layer: Layer, cluster: Cluster, length: int, ranks: int) -> tuple[Hop, Hop]:
    """The hops of a causal zigzag ring, forward and backward, of ``length`` positions a rank.

    Zigzag gives every hop ``length**2 / 2`` pairs: the own shard's triangle, and of every other
    shard one rectangle without a mask, half of the queries or half of the keys.
    """
    flops = 4 * layer.heads * layer.head_dim * length**2 / 2
    message = layer.kv_heads * length * 2 * layer.head_dim
    link, latency = cluster.link(ranks), cluster.latency
    keys = latency + message * layer.itemsize / link
    sums = latency + message * layer.sum_itemsize / link
    forward = (flops / speed_at(speeds, length) for speeds in (cluster.causal, cluster.full))
    backward = 2.5 * flops / speed_at(cluster.backward, length)
    return Hop(*forward, keys), Hop(backward, backward, keys, sums)


def ring(layer: Layer, cluster: Cluster, length: int, ranks: int) -> Phases:
    """Seconds of a causal zigzag ring."""
    hops = ring_hops(layer, cluster, length, ranks)
    return Phases(*(ring_seconds(hop, ranks) for hop in hops))


def computing(layer: Layer, cluster: Cluster, length: int, ranks: int) -> Phases:
    """Seconds that the same ring would take if messages took none."""
    hops = ring_hops(layer, cluster, length, ranks)
    return Phases(*(hop.own + (ranks - 1) * hop.other for hop in hops))


def ulysses(layer: Layer, cluster: Cluster, length: int, ranks: int) -> Phases | None:
    """Seconds by all-to-all, which overlaps with nothing; None where ranks don't divide heads."""
    if layer.kv_heads % ranks or layer.heads % ranks:
        return None
    whole = length * ranks
    flops = 4 * layer.heads / ranks * layer.head_dim * whole**2 / 2
    sent, _ = ulysses_bytes(layer, length, ranks)
    exchanged = 4 * cluster.latency + sent / cluster.link(ranks)  # q, k, v and o
    return Phases(
        flops / speed_at(cluster.causal, whole) + exchanged,
        2.5 * flops / speed_at(cluster.backward, whole) + exchanged,
    )


def ring_memory(layer: Layer, length: int) -> int:
    """Bytes of a rank at the peak of its backward pass, its inputs and gradients included.

    Kept: q, k, v, o, do and the LSE. Made: dq, and of keys' size two messages, the sums of this
    hop, those that arrive, and what the last piece gave; all gradients in the sums' dtype.
    """
    query, key = layer.heads * layer.head_dim, 2 * layer.kv_heads * layer.head_dim
    kept = layer.itemsize * (3 * query + key) + layer.sum_itemsize * layer.heads
    made = layer.itemsize * 2 * key + layer.sum_itemsize * (query + 2 * key)
    parts = layer.itemsize * (query + key)
    return length * (kept + made + parts)


def hiding_length(layer: Layer, cluster: Cluster, ranks: int, phase: str) -> int:
    """The fewest positions a rank, to a power of two times 128, at which no hop waits."""
    length = 128
    while True:
        hop = ring_hops(layer, cluster, length, ranks)[phase == "backward"]
        if hop.other >= hop.keys + hop.sums:
            return length
        length *= 2


def main(argv: list[str]) -> int:
    """Tabulate and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scaling", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--measured", type=Path, help="JSON with the fields of Cluster")
    parser.add_argument("--heads", type=int, default=Layer.heads)
    parser.add_argument("--kv-heads", type=int, default=Layer.kv_heads)
    parser.add_argument("--head-dim", type=int, default=Layer.head_dim)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    args = parser.parse_args(argv)
    layer = Layer(args.heads, args.kv_heads, args.head_dim)
    try:
        cluster = PUBLISHED if args.measured is None else read_cluster(args.measured)
    except UsageError as error:
        parser.error(str(error))
    results = tabulate(layer, cluster)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "scaling.md").write_text(markdown(results), encoding="utf-8")
    plots.scaling(args.out / "scaling.png", results)
    print(f"{args.out / 'scaling.md'}, {args.out / 'scaling.png'}")
    return 0


def read_cluster(path: Path) -> Cluster:
    """A cluster from a JSON file; its lengths are strings there."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        for name in ("causal", "full", "backward"):
            fields[name] = {int(length): float(speed) for length, speed in fields[name].items()}
        return Cluster(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        names = ", ".join(Cluster.__dataclass_fields__)
        raise UsageError(f"{path} does not hold a cluster ({names}): {error}") from error


TOKENS = (2**17, 2**18, 2**19, 2**20)
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def tabulate(layer: Layer, cluster: Cluster) -> dict[str, Any]:
    """All that the page and the plot show."""
    return {
        "layer": asdict(layer),
        "cluster": asdict(cluster),
        "hops": [
            {"length": 2**power, **_hop_row(layer, cluster, 2**power)} for power in range(8, 18)
        ],
        "hiding": [
            {"link": name, "phase": phase, "length": hiding_length(layer, cluster, ranks, phase)}
            for name, ranks in (("near", cluster.node), ("far", 2 * cluster.node))
            for phase in Phases._fields
        ],
        "rings": [
            _ring_row(layer, cluster, tokens, ranks)
            for tokens in TOKENS
            for ranks in RANKS
            if tokens // ranks >= 256
        ],
    }


def _hop_row(layer: Layer, cluster: Cluster, length: int) -> dict[str, float]:
    row = {}
    for link, ranks in (("near", cluster.node), ("far", 2 * cluster.node)):
        for phase, hop in zip(
            Phases._fields, ring_hops(layer, cluster, length, ranks), strict=True
        ):
            row[f"{phase}_compute"] = hop.other
            row[f"{phase}_{link}"] = hop.keys + hop.sums
    return row


def _ring_row(layer: Layer, cluster: Cluster, tokens: int, ranks: int) -> dict[str, Any]:
    length = tokens // ranks
    taken, alone = ring(layer, cluster, length, ranks), computing(layer, cluster, length, ranks)
    exchange = ulysses(layer, cluster, length, ranks)
    return {
        "tokens": tokens,
        "ranks": ranks,
        "length": length,
        "memory_bytes": ring_memory(layer, length),
        "sent_bytes": sum(ring_bytes(layer, length, ranks)),
        "seconds": taken.both,
        "busy": {name: getattr(alone, name) / getattr(taken, name) for name in Phases._fields},
        "busy_both": alone.both / taken.both,
        "ulysses_seconds": None if exchange is None else exchange.both,
    }


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    layer, cluster = results["layer"], results["cluster"]
    hiding = [
        [
            f"{'in a node' if row['link'] == 'near' else 'between nodes'}, {row['phase']}",
            f"{cluster[row['link']] / 1e9:,.0f} GB/s",
            f"{row['length']:,}",
        ]
        for row in results["hiding"]
    ]
    rings = [
        [
            f"{row['tokens']:,}",
            f"{row['ranks']:,}",
            f"{row['length']:,}",
            f"{row['memory_bytes'] / MIB:,.0f} MiB",
            f"{row['sent_bytes'] / MIB:,.0f} MiB",
            f"{1e3 * row['seconds']:,.2f} ms",
            f"{row['busy']['forward']:.0%}",
            f"{row['busy']['backward']:.0%}",
            "-" if row["ulysses_seconds"] is None else f"{1e3 * row['ulysses_seconds']:,.2f} ms",
        ]
        for row in results["rings"]
    ]
    return (
        "\n\n".join(
            [
                "# Scaling of attention over many GPUs: a model",
                f"One causal layer: {layer['heads']} query and {layer['kv_heads']} kv heads of "
                f"{layer['head_dim']}, one sequence, {layer['itemsize']} bytes an element. Speeds: "
                f"{cluster['source']}.",
                "## Positions a rank from which no hop waits for a message",
                table(["ring", "link", "positions a rank"], hiding),
                "In powers of two times 128.",
                "## Rings, and Ulysses where the ranks divide the kv heads",
                table(
                    [
                        "tokens",
                        "GPUs",
                        "a GPU",
                        "memory a GPU",
                        "sent a GPU",
                        "ring, both passes",
                        "computing, forward",
                        "backward",
                        "Ulysses",
                    ],
                    rings,
                ),
                "`computing` is the share of a pass in which a GPU computes; the rest it waits.",
                "![Compute and transfer per hop, and how busy GPUs are](scaling.png)",
            ]
        )
        + "\n"
    )
