"""A closed loop of calls: N in flight, each followed by the next, for some seconds; raw bytes."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import uvloop

WARM_UP_S = 0.7


async def drive(
    address: str, method: str, requests: list[bytes], in_flight: int, seconds: float
) -> dict[str, float]:
    """Calls per second and latencies, after a warm-up."""
    latencies_s: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(method)
        start = time.perf_counter() + WARM_UP_S
        end = start + seconds

        async def caller(number: int) -> None:
            turn = number
            while (begin := time.perf_counter()) < end:
                await call(requests[turn % len(requests)])
                turn += in_flight
                if begin >= start:
                    latencies_s.append(time.perf_counter() - begin)

        await asyncio.gather(*(caller(number) for number in range(in_flight)))
    latencies_s.sort()
    return {
        "calls_per_s": len(latencies_s) / seconds,
        "p50_ms": latencies_s[len(latencies_s) // 2] * 1e3,
        "p99_ms": latencies_s[len(latencies_s) * 99 // 100] * 1e3,
    }


def main() -> None:
    """Arguments: address, method, file of requests (hex, one a line), in flight, seconds."""
    address, method, path, in_flight, seconds = sys.argv[1:]
    requests = [bytes.fromhex(text) for text in Path(path).read_text().split()]
    outcome = uvloop.run(drive(address, method, requests, int(in_flight), float(seconds)))
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
