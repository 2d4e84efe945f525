"""Requests to an endpoint as many clients send them, and how long each waited: what an operator measures.

Closed loop: so many clients, each asking again when it has its answer. Open loop: requests come at a rate, at random
moments (Poisson), whether or not earlier ones are done. Definitions are those of `vllm bench serve`: TTFT until the
first token, TPOT = (end - first token) / (tokens - 1), ITL from event to event, E2E until the last byte; goodput =
requests per second that keep all stated limits.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PERCENTILES = (50, 90, 99)


@dataclass
class Timing:
    """What one client saw of one request."""

    sent_s: float
    events_s: list[float] = field(default_factory=list)
    """When something of the answer came."""
    end_s: float = 0.0
    tokens: int = 0
    error: str | None = None

    @property
    def first_token_s(self) -> float:
        """Seconds until the first token."""
        return self.events_s[0] - self.sent_s

    @property
    def per_token_s(self) -> float:
        """Seconds from token to token, on average."""
        return (self.events_s[-1] - self.events_s[0]) / max(1, self.tokens - 1)


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Timing:
    """Stream one answer; what goes wrong is in the timing's error."""
    timing = Timing(time.perf_counter())
    rest = b""
    try:
        async with session.post(url, json=body | {"stream": True, "stream_options": {"include_usage": True}}) as answer:
            if answer.status != 200:
                timing.error = f"{answer.status}: {(await answer.text())[:200]}"
                return timing
            async for data in answer.content.iter_any():
                *events, rest = (rest + data).split(b"\n\n")
                now_s = time.perf_counter()
                if any(b'"choices":[{' in event for event in events):
                    timing.events_s.append(now_s)
                for event in events:
                    if b'"usage":{' in event:
                        timing.tokens = json.loads(event[6:])["usage"]["completion_tokens"]
                    elif b'"error":{' in event:
                        timing.error = event[6:206].decode("utf-8", "replace")
            timing.end_s = time.perf_counter()
    except (aiohttp.ClientError, OSError) as err:
        timing.error = repr(err)
    if timing.error is None and not (timing.tokens and timing.events_s):
        timing.error = "the stream ended before its answer did"
    return timing


async def closed_loop(url: str, bodies: Sequence[dict[str, Any]], clients: int, key: str | None) -> list[Timing]:
    """Send all bodies, `clients` at a time."""
    waiting = list(reversed(bodies))

    async with _session(key) as session:

        async def client() -> list[Timing]:
            timings = []
            while waiting:
                timings.append(await ask(session, url, waiting.pop()))
            return timings

        return [timing for some in await asyncio.gather(*(client() for _ in range(clients))) for timing in some]


async def open_loop(
    url: str, bodies: Sequence[dict[str, Any]], per_s: float, seed: int, key: str | None
) -> list[Timing]:
    """Send bodies at random moments, `per_s` of them a second on average."""
    draw = random.Random(seed)
    async with _session(key) as session:
        tasks = []
        next_s = time.perf_counter()
        for body in bodies:
            await asyncio.sleep(next_s - time.perf_counter())
            tasks.append(asyncio.create_task(ask(session, url, body)))
            next_s += draw.expovariate(per_s)
        return await asyncio.gather(*tasks)


def _session(key: str | None) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), headers=headers
    )


def figures(timings: Sequence[Timing], first_token_ms: float, per_token_ms: float) -> dict[str, Any]:
    """Return throughput, latencies in ms, and goodput under the two limits."""
    good = [timing for timing in timings if timing.error is None]
    found: dict[str, Any] = {"requests": len(timings), "failed": len(timings) - len(good)}
    if not good:
        return found | {"error": timings[0].error if timings else "nothing was asked"}
    elapsed_s = max(timing.end_s for timing in good) - min(timing.sent_s for timing in timings)
    kept = sum(
        1e3 * timing.first_token_s <= first_token_ms and 1e3 * timing.per_token_s <= per_token_ms for timing in good
    )
    found |= {
        "tokens_per_s": sum(timing.tokens for timing in good) / elapsed_s,
        "requests_per_s": len(good) / elapsed_s,
        "goodput_per_s": kept / elapsed_s,
    }
    gaps = [later - earlier for timing in good for earlier, later in zip(timing.events_s, timing.events_s[1:])]
    for name, values in (
        ("ttft_ms", [timing.first_token_s for timing in good]), ("tpot_ms", [timing.per_token_s for timing in good]),
        ("itl_ms", gaps), ("e2e_ms", [timing.end_s - timing.sent_s for timing in good]),
    ):  # fmt: skip
        found |= {f"{name}_p{percent}": 1e3 * percentile(values, percent) for percent in PERCENTILES}
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile, interpolated; of no value 0."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
