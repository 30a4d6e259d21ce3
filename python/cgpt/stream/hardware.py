"""What devices, links and drives are good for, in numbers, each with its source. Rates are assumptions until measured:
a run prints its own beside them. Prices are rents, and differ twofold between those who ask them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """peak: dense bf16 FLOP/s. sustained: the share of it that a training step's products reach. memory: bytes of the
    device. bandwidth: of that memory, bytes/s. link: its name in LINKS. host: DRAM bytes/s left for AdamW. watts: of
    the board at full load. usd: rent of an hour. source; cost_source: of watts and usd. network, peers: names in
    NETWORKS of what usually joins it to other machines' devices, and to those of its own."""

    name: str
    peak: float
    sustained: float
    memory: float
    bandwidth: float
    link: str
    host: float
    source: str
    watts: float
    usd: float
    cost_source: str
    network: str
    peers: str


SERVER_DRAM = 150e9  # eight channels of DDR5-4800 are 307 GB/s; two thirds usable, less 50 GB/s that the link takes
DESKTOP_DRAM = 60e9  # two channels of DDR5-5600 are 90 GB/s, two thirds of it usable

LLMQ = "LLMQ's H100x1 benchmark: 54.6 % with 14B parameters in bf16 and state on the host"
RENT = "on demand from specialised clouds, May 2026 (mercatus-ai.com, cloud GPU pricing)"

DEVICES = {
    "h100": Hardware(
        "NVIDIA H100 SXM", 989.4e12, 0.55, 80e9, 3.35e12, "gen5", SERVER_DRAM,
        f"peak, memory: NVIDIA H100 datasheet, dense; sustained: {LLMQ}",
        700, 3.0, f"watts: NVIDIA H100 datasheet; rent: $2.50 to 3.50 {RENT}", "400g", "nvlink4",
    ),
    "h200": Hardware(
        "NVIDIA H200 SXM", 989.4e12, 0.55, 141e9, 4.8e12, "gen5", SERVER_DRAM,
        f"peak, memory: NVIDIA H200 datasheet, dense; sustained as on the H100: {LLMQ}",
        700, 4.0, f"watts: NVIDIA H200 datasheet; rent: $3.50 to 4.50 {RENT}", "400g", "nvlink4",
    ),
    "a100-80gb": Hardware(
        "NVIDIA A100 80 GB SXM", 312e12, 0.55, 80e9, 2.039e12, "gen4", 100e9,
        "peak, memory: NVIDIA A100 datasheet, dense; sustained: assumed as on the H100; DRAM: eight channels of "
        "DDR4-3200 are 205 GB/s",
        400, 1.3, f"watts: NVIDIA A100 datasheet; rent: $1.10 to 1.50 {RENT}", "200g", "nvlink3",
    ),
    "rtx-4090": Hardware(
        "NVIDIA GeForce RTX 4090", 165.2e12, 0.7, 24e9, 1.008e12, "gen4", DESKTOP_DRAM,
        "peak, memory: NVIDIA Ada whitepaper, bf16 with fp32 sums; sustained: LLMQ's 4090 benchmark, 70 % at 14B",
        450, 0.5, "watts: NVIDIA Ada whitepaper; rent: assumed, as marketplaces ask $0.35 to 0.70",
        "100g", "pcie",
    ),
    "cpu": Hardware(
        "two CPU cores", 0.38e12, 0.5, 8e9, 10e9, "copy", 10e9,
        "peak: two AVX-512 units a core at 3 GHz in fp32; memory: a budget, not a device; bandwidth: AdamW measured at "
        "8 to 10 GB/s on such a machine",
        15, 0.1, "watts: assumed, two of 96 cores of a 400 W processor and memory; rent: assumed, of two cores",
        "100g", "memory",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """Bytes/s of each direction while both are busy."""

    rate: float
    source: str


LINKS = {
    "gen5": Link(50e9, "PCIe 5.0 x16 is 63 GB/s; nvbandwidth shows 55 one way"),
    "gen4": Link(25e9, "PCIe 4.0 x16 is 31.5 GB/s; 24 to 26 measured one way"),
    "copy": Link(5e9, "memory to memory: a byte copied is one read and one written"),
}


@dataclass(frozen=True)
class Network:
    """Between devices. rate: bytes/s that each receives while it sends as much. hop: seconds from one to the next."""

    rate: float
    hop: float
    source: str


NET_HOP = 14e-6  # and CALL: NCCL's cost model of a ring (src/graph/tuning.cc), Simple protocol
CALL = 8.4e-6  # seconds, of any collective
TESTS = "46 to 48 GB/s of 50 reach a device (nccl-tests, issues 267 and 290)"

NETWORKS = {
    "400g": Network(47e9, NET_HOP, f"InfiniBand NDR or RoCE, a port a device: {TESTS}"),
    "200g": Network(23.5e9, NET_HOP, f"InfiniBand HDR or RoCE, a port a device: the share of 400g, of which {TESTS}"),
    "100g": Network(11.7e9, NET_HOP, f"InfiniBand EDR or RoCE, a port a device: the share of 400g, of which {TESTS}"),
    "nvlink4": Network(360e9, 3.4e-6, "NVLink 4: 450 GB/s each way, of which NCCL's cost model takes 360"),
    "nvlink3": Network(240e9, 3.4e-6, "NVLink 3: 300 GB/s each way, and the share of NVLink 4"),
    "pcie": Network(12e9, 5.7e-6, "PCIe 4.0 x16 by way of the host's memory: assumed, half of one copy's 25 GB/s"),
    "memory": Network(5e9, 1e-5, "memory to memory: a byte copied is one read and one written; a turn of a thread"),
}


def wire(count: int, node: int, peers: Network, network: Network) -> tuple[float, float]:
    """Bytes/s that each of `count` devices, `node` a machine, receives of what the others send it in equal pieces, each
    straight from its owner; and seconds that a collective takes beside: a ring's count - 1 hops, all but one
    a machine within it. NCCL gathers in rings; its exchanges go straight, and are taken to be no quicker."""
    near = min(count, node)
    far, machines = count - near, -(-count // node)
    if count == 1:
        return math.inf, 0.0
    rate = (count - 1) / max((near - 1) / peers.rate, far / network.rate)
    hops = (machines - 1) * network.hop + (count - machines) * peers.hop
    return rate, CALL + hops


@dataclass(frozen=True)
class Drive:
    """Bytes/s, and terabytes that may be written to each terabyte of it in its rated life."""

    read: float
    write: float
    endurance: float
    source: str


DRIVE = Drive(7e9, 5e9, 600.0, "one PCIe 4.0 NVMe drive: 7 and 5 GB/s, 600 TB rated for 1 TB of a consumer drive")
