"""A proxy between a client and a server: what the network does to their connections."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# On closing: say nothing more, reset.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Passes on what both sides say to each other; late, in pieces, or not at all while it is told so. A thread of its own."""

    def __init__(self, port_behind: int) -> None:
        self._port_behind = port_behind
        # How much later the client hears what the server says (seconds).
        self.delay_seconds = 0.0
        # Whether both hear each other a few bytes at a time.
        self.slices = False
        self._swallows = False
        self._clients: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, sock=self._listening), self._loop).result()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def reset(self) -> None:
        """Reset all connections."""
        self._loop.call_soon_threadsafe(self._reset)

    @contextmanager
    def swallowing(self) -> Iterator[None]:
        """Let the server hear the client, but not the other way round; then reset what can't be mended."""
        self._swallows = True
        try:
            yield
        finally:
            self._swallows = False
            self.reset()

    def _reset(self) -> None:
        for client in self._clients:
            client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.transport.abort()

    async def _end(self) -> None:
        self._reset()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self._port_behind)
            try:
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(self._pump(reader, behind_writer, to_client=False))
                    pumps.create_task(self._pump(behind_reader, writer, to_client=True))
            finally:
                behind_writer.close()
        except* (OSError, EOFError):
            pass
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_client: bool) -> None:
        """Pass on what comes until one side ends; ends by EOFError, so that the other direction ends too."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        writing = asyncio.create_task(self._write(waiting, writer, to_client=to_client))
        try:
            while said := await reader.read(1 << 16):
                waiting.put_nowait((self._loop.time() + (self.delay_seconds if to_client else 0), said))
        finally:
            writing.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await writing
        raise EOFError

    async def _write(self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, *, to_client: bool) -> None:
        while True:
            due_at, said = await waiting.get()
            await asyncio.sleep(max(0, due_at - self._loop.time()))
            if to_client and self._swallows:
                continue
            while said:
                length = random.randint(1, 100) if self.slices else len(said)
                piece, said = said[:length], said[length:]
                writer.write(piece)
                await writer.drain()
                if self.slices:
                    await asyncio.sleep(0)
