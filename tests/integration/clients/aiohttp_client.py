"""Sends a file N times by aiohttp, eight at a time; prints the status of each answer."""

import asyncio
import sys
from pathlib import Path

import aiohttp

N_AT_ONCE = 8


async def send_all(url: str, file: str, n: str) -> None:
    body, free = Path(file).read_bytes(), asyncio.Semaphore(N_AT_ONCE)

    async def send(session: aiohttp.ClientSession) -> None:
        async with free:
            try:
                async with session.post(url, data=body) as response:
                    await response.read()
                    print(response.status)
            except (aiohttp.ClientError, OSError) as error:
                print(f"lost: {error!r}")

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(send(session) for _ in range(int(n))))


asyncio.run(send_all(*sys.argv[1:]))
