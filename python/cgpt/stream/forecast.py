from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    flops: float
    down: float
    up: float
    memory: float
    read: float
    write: float
    latency: float = 0.0
    half_duplex: bool = False
