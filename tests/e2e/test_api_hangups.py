"""Clients that hang up: nothing runs on for them, and nothing of them stays (points 34 and 43, and section 4)."""

import asyncio
import contextlib
import json
import random
import re
import struct
import time

import pytest
from api_backends import CAPACITY, MAX_RUNNING, engine_backend, ids_of
from api_server import HELLO, Server, serving, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]
CLIENTS = 200


@pytest.fixture(scope="module")
def server():
    backend = engine_backend()
    with serving(backend, max_waiting=64, event_interval_s=0.0) as server:
        yield server
    backend.close()


def gauges(server: Server) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in re.findall(
            r"^vllm:(num_requests_\w+|kv_cache_usage_perc) (\S+)$", server.get("/metrics").text, re.M
        )
    }


def is_idle(server: Server) -> bool:
    load = server.backend.load()
    return load.running == load.waiting == 0 and load.kv_tokens_free == load.kv_tokens


def check_idle(server: Server, timeout_s: float = 2.0) -> None:
    wait_until(lambda: is_idle(server), timeout_s)
    assert gauges(server) == {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
    assert all(not one.mailboxes for one in server.backend._hosted.values())


def bytes_of(path: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def long_request(draw: random.Random) -> bytes:
    body = {
        "stream": draw.random() < 0.6,
        "n": draw.choice([1, 1, 1, 3]),
        "seed": draw.randrange(99),
        "ignore_eos": True,
    }
    length = draw.choice([3, 40, 120])
    if draw.random() < 0.7:
        messages = [{"role": "user", "content": "".join(draw.choices("abcdefgh ", k=length))}]
        return bytes_of("/v1/chat/completions", {"model": "sft", "messages": messages, **body})
    prompt = "".join(draw.choices("abcdefgh ", k=length))
    body |= {"max_tokens": CAPACITY - 130, "echo": draw.random() < 0.3, "logprobs": draw.choice([None, 2])}
    return bytes_of("/v1/completions", {"model": "pretrain", "prompt": prompt, **body})


async def hang_up(port: int, draw: random.Random) -> None:
    """Send a request, or a part of it, read some of the answer, or none, and leave: with FIN or with RST."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = long_request(draw)
    how = draw.random()
    with contextlib.suppress(OSError):
        writer.write(request if how > 0.1 else request[: draw.randrange(len(request))])
        if how > 0.3:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.random() * 0.3):
                    left = draw.randrange(1, 6000)
                    while left > 0 and (data := await reader.read(left)):
                        left -= len(data)
        if draw.random() < 0.5:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER: close sends RST
        writer.close()
        await writer.wait_closed()


def test_43_two_hundred_clients_hang_up_at_random_points_and_nothing_runs_on(server):
    draw = random.Random(1)
    seen = {"running": 0, "waiting": 0}

    async def main() -> None:
        gate = asyncio.Semaphore(50)

        async def one(number: int) -> None:
            async with gate:
                await hang_up(server.port, random.Random(number))
                load = server.backend.load()
                seen["running"] = max(seen["running"], load.running)
                seen["waiting"] = max(seen["waiting"], load.waiting)

        await asyncio.gather(*(one(draw.randrange(10**6)) for _ in range(CLIENTS)))

    asyncio.run(main())
    assert seen["running"] >= MAX_RUNNING
    assert seen["waiting"] >= 1, "some must have hung up while they waited"
    check_idle(server)
    answer = server.chat(max_tokens=4, seed=1)
    assert answer.status_code == 200
    assert server.get("/health").status_code == 200


def test_43_others_are_not_disturbed_by_those_who_leave(server):
    body = {"seed": 3, "temperature": 1.0, "max_tokens": 120, "return_token_ids": True, "ignore_eos": True}
    alone = server.chat(**body).json()["choices"][0]["token_ids"]

    async def main() -> list[int]:
        leaving = asyncio.gather(*(hang_up(server.port, random.Random(number)) for number in range(20)))
        answer = await asyncio.to_thread(server.chat, **body)
        await leaving
        return answer.json()["choices"][0]["token_ids"]

    assert asyncio.run(main()) == alone
    check_idle(server)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_43_a_request_that_waits_or_runs_is_aborted_when_its_client_leaves(server, is_stream, n):
    body = {"model": "sft", "messages": HELLO, "n": n, "stream": is_stream, "min_tokens": 240}

    async def main() -> None:
        connections = []
        for _ in range(MAX_RUNNING + 4):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(bytes_of("/v1/chat/completions", body))
            connections.append(writer)
        async with asyncio.timeout(5):
            while not (server.backend.load().running == MAX_RUNNING and server.backend.load().waiting):
                await asyncio.sleep(0.002)
        for writer in connections:
            writer.close()

    asyncio.run(main())
    check_idle(server, 1.0)


@pytest.mark.parametrize("is_stream", [False, True])
def test_43_an_answer_that_nobody_reads_is_not_computed_to_its_end(scripted, is_stream):
    """The client leaves while the engine says nothing: that is noticed without a token."""
    scripted.backend.script.stalls_at = 2

    async def main() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
        writer.write(bytes_of("/v1/chat/completions", {"model": "sft", "messages": HELLO, "stream": is_stream}))
        async with asyncio.timeout(5):
            while not scripted.backend.running:
                await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)
        writer.close()

    asyncio.run(main())
    assert wait_until(lambda: scripted.backend.running == 0, 2) < 1
    assert scripted.backend.aborted == 1


def test_43_a_client_that_reads_slowly_loses_nothing(scripted):
    scripted.backend.script.ids = ids_of("slow " * 40)
    raw = b""
    with scripted.http.stream("POST", "/v1/chat/completions",
                              json={"model": "sft", "messages": HELLO, "stream": True}) as answer:  # fmt: skip
        for data in answer.iter_raw():
            raw += data
            time.sleep(0.002)
    assert raw.endswith(b"data: [DONE]\n\n")
    assert raw.count(b'"content":"s"') == 40


def test_05_health_and_gauges_answer_while_the_engine_works(server):
    """The event loop is never the engine's: who asks for health does not wait for tokens."""
    body = {"model": "sft", "messages": HELLO, "min_tokens": 240, "n": 4, "stream": True}

    async def main() -> tuple[list[float], list[dict[str, float]]]:
        connections = []
        for _ in range(4):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(bytes_of("/v1/chat/completions", body))
            connections.append(writer)
        times, seen = [], []
        for _ in range(20):
            began_s = time.monotonic()
            assert (await asyncio.to_thread(server.get, "/health")).status_code == 200
            times.append(time.monotonic() - began_s)
            seen.append(await asyncio.to_thread(gauges, server))
        for writer in connections:
            writer.close()
        return times, seen

    times, seen = asyncio.run(main())
    assert sorted(times)[-3] < 0.3
    busy = max(seen, key=lambda one: one["num_requests_running"])
    assert busy["num_requests_running"] >= MAX_RUNNING
    assert 0 < max(one["kv_cache_usage_perc"] for one in seen) <= 1
    assert max(one["num_requests_waiting"] for one in seen) >= 1
    check_idle(server)
