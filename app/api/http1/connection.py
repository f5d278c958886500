"""Connection: one client, over one TCP or TLS connection. Requests are served one after the other."""

import asyncio
import enum
import logging
import math
from collections.abc import Callable
from typing import Any, cast

from uvicorn import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from app.api.http1.bodies import BodyReader, ChunkedReader, LengthReader
from app.api.http1.capacity import Capacity
from app.api.http1.deadlines import Deadlines
from app.api.http1.exchange import Exchange, Output
from app.api.http1.heads import Head, HeadBuffer, parse_head
from app.api.http1.refusals import write_refusal
from app.api.http1.sockets import is_reset, keep_probing
from app.api.http1.timeouts import Timeouts
from app.errors import RequestTimeout, ServiceError, status_and_code

# A client that still sends after its response gets the response only if what it sends is read. Closing a socket with
# unread bytes resets it, and the client loses what it has not read yet.
LINGER_BYTES = 256_000_000
LINGER_SECONDS = 30.0
LINGER_IDLE_SECONDS = 2.0
# A client that has closed its connection looks like one that has only finished sending, until something is sent to it.
PROBE_SECONDS, PROBE_CHECK_SECONDS = 0.25, 0.05
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class State(enum.Enum):
    HEAD = "no request, or a part of a head"
    BODY = "a part of a body; the response may be sent already"
    COMPLETE = "a complete request without a complete response"
    REFUSED = "a request that cannot be read on; what follows is discarded"


class Connection(asyncio.Protocol):
    """A uvicorn protocol. `Connections` makes them."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
        timeouts: Timeouts,
        deadlines: Deadlines,
        capacity: Capacity,
        count_refusal: Callable[[str], None],
    ) -> None:
        if not config.loaded:
            config.load()
        self.config, self.server_state, self.loop = config, server_state, loop
        self.logger = logging.getLogger("uvicorn.error")
        self._app_state, self._timeouts, self._deadlines = app_state, timeouts, deadlines
        self._capacity, self._count_refusal = capacity, count_refusal
        self._state = State.HEAD
        self._unread = b""
        self._head = HeadBuffer()
        self._body: BodyReader = LengthReader(0)
        self.cycle: Exchange | None = None
        self._deadline = self._write_deadline = self._linger_until = math.inf
        # Bytes of the body in the current interval, bytes discarded, and bytes that the client has not read.
        self._n_received = self._n_discarded = self._n_unwritten = 0
        # Whether a byte of the next request has arrived, and whether the client has finished sending.
        self._has_begun = self._has_ended = self._is_scheduled = False

    # The transport's calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.flow = FlowControl(self.transport)
        self.output = Output(self)
        self.server_state.connections.add(self)  # type: ignore[arg-type]
        self._peers = {
            "server": get_local_addr(self.transport),
            "client": get_remote_addr(self.transport),
            "scheme": "https" if is_ssl(self.transport) else "http",
        }
        keep_probing(self.transport)
        self._deadline = self.loop.time() + self.config.timeout_keep_alive
        self._deadlines.add(self, self.loop)
        self._capacity.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(self)
        self._deadlines.discard(self)
        self._capacity.discard(self)
        self._unread = b""
        if self.cycle is not None:
            self.cycle.disconnected = not self.cycle.response_complete
            self.cycle.message_event.set()
        self.flow.resume_writing()

    def data_received(self, data: bytes) -> None:
        self._unread = self._unread + data if self._unread else data
        if not self._is_scheduled:
            self._read()

    def eof_received(self) -> bool:
        """Return whether to keep the connection open, to answer a client that has only finished sending."""
        self._has_ended = True
        is_answering = self.cycle is not None and not self.cycle.response_complete
        is_kept = is_answering and self._state is not State.BODY and self._peers["scheme"] == "http"
        if is_kept:
            self.loop.call_later(PROBE_SECONDS, self._probe_half_closed, False)
        return is_kept

    def pause_writing(self) -> None:
        self._await_reader()
        self.flow.pause_writing()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._write_deadline = math.inf
        self.flow.resume_writing()

    # The server's calls.

    def abort(self) -> None:
        """Close at once, whatever is unread or unwritten."""
        self.transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether there is neither a request in flight nor a part of one."""
        return self._state is State.HEAD and not self._has_begun

    def shutdown(self) -> None:
        """Close now, or after the response in flight."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    # Reading.

    def _read(self) -> None:
        while self._unread and not self.transport.is_closing():
            if self._state is State.HEAD:
                self._read_head()
            elif self._state is State.BODY:
                self._read_body()
            elif self._state is State.REFUSED:
                self._discard(len(self._unread))
                self._unread = b""
            if self._state is State.COMPLETE or self._is_scheduled:
                break
        if self._state is State.COMPLETE and len(self._unread) > HIGH_WATER_LIMIT:
            # Requests sent ahead wait until this one is answered.
            self.flow.pause_reading()

    def _read_head(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._deadline = self.loop.time() + self._timeouts.head
        data, self._unread = self._unread, b""
        head = b""
        try:
            head, self._unread = self._head.feed(data)
            if head:
                self._begin(parse_head(head))
        except ServiceError as error:
            self._refuse(error, head)

    def _begin(self, head: Head) -> None:
        """Give the request to the application, which reads the body while it arrives."""
        self._body = ChunkedReader() if head.length is None else LengthReader(head.length)
        self.cycle = Exchange(
            self, self._scope(head), expects_continue=head.expects_continue, is_kept_alive=head.is_kept_alive
        )
        self._state, self._n_discarded = State.BODY, 0
        if self._body.is_complete:
            self._complete_request()
        else:
            self._capacity.await_body(self)
            self._begin_interval()
        task = self.loop.create_task(self.cycle.run_asgi(self.config.loaded_app))
        task.add_done_callback(self.server_state.tasks.discard)
        self.server_state.tasks.add(task)

    def _scope(self, head: Head) -> dict[str, Any]:
        root_path = self.config.root_path
        return {
            "type": "http",
            "asgi": {"version": self.config.asgi_version, "spec_version": "2.3"},
            "http_version": head.version,
            **self._peers,
            "method": head.method,
            "root_path": root_path,
            "path": root_path + head.path,
            "raw_path": root_path.encode("ascii") + head.raw_path,
            "query_string": head.query,
            "headers": head.headers,
            "state": self._app_state.copy(),
        }

    def _read_body(self) -> None:
        assert self.cycle is not None
        n_turn = self._body.n_per_turn
        data, later = self._unread[:n_turn], self._unread[n_turn:]
        try:
            body, rest = self._body.feed(data)
        except ServiceError as error:
            self._fail_body(error)
            return
        self._unread = rest + later if rest else later
        self._n_received += len(data) - len(rest)
        if self.cycle.response_complete:
            self._discard(len(data) - len(rest))
        else:
            self.cycle.body += body
            if len(self.cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            self.cycle.message_event.set()
        if self._body.is_complete:
            self._complete_request()
        elif later:
            self._read_later()

    def _read_later(self) -> None:
        self._is_scheduled = True
        self.flow.pause_reading()
        self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._is_scheduled = False
        self._read()
        if self.cycle is not None and not self._is_scheduled and len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def _complete_request(self) -> None:
        assert self.cycle is not None
        self._state, self._deadline = State.COMPLETE, math.inf
        self._capacity.answer(self)
        self.cycle.more_body = False
        if self.cycle.response_complete:
            self._end_exchange()
        else:
            self.cycle.message_event.set()

    @property
    def n_left_of_body(self) -> int | None:
        return self._body.n_left

    # Responses.

    def on_response_complete(self) -> None:
        assert self.cycle is not None
        self.server_state.total_requests += 1
        # What the application has not read.
        self.cycle.body = bytearray()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._state is State.COMPLETE:
            self._end_exchange()
        elif self._state is State.REFUSED:
            self._linger()

    def _end_exchange(self) -> None:
        """Go on to the next request, or close."""
        assert self.cycle is not None
        if not self.cycle.keep_alive:
            self._close()
            return
        self._state, self._has_begun = State.HEAD, False
        self._capacity.await_request(self)
        # It refers to the version that answered, which may be dropped while the connection is idle.
        self.cycle = None
        self._deadline = self.loop.time() + self.config.timeout_keep_alive
        self._read()
        if self._has_ended and self._state is not State.COMPLETE:
            # No more of this request can arrive.
            self._close()

    def _close(self) -> None:
        """Close. Requests sent ahead are not answered, but must not cost the client this response."""
        if self._unread and not self._has_ended:
            self._linger()
            return
        self.transport.close()
        # The transport may still have to write.
        self._await_reader()

    def _linger(self) -> None:
        """Discard what the client still sends, until it has read the response and closes."""
        if self._has_ended:
            self._close()
            return
        self._state, self._unread = State.REFUSED, b""
        self._capacity.await_request(self)
        now = self.loop.time()
        self._linger_until, self._deadline = now + LINGER_SECONDS, now + LINGER_IDLE_SECONDS
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()

    def _discard(self, n_bytes: int) -> None:
        self._n_discarded += n_bytes
        if self._n_discarded > LINGER_BYTES:
            self._unread = b""
            self._close()
        elif self._linger_until < math.inf:
            self._deadline = min(self._linger_until, self.loop.time() + LINGER_IDLE_SECONDS)

    # Refusals.

    def _refuse(self, error: ServiceError, head: bytes) -> None:
        """Answer a request that does not reach the application."""
        self._count_refusal(status_and_code(error)[1])
        self._n_discarded = 0
        write_refusal(error, head, self.transport, self.server_state.default_headers)
        self._linger()

    def _fail_body(self, error: ServiceError) -> None:
        """End a body that is malformed or too slow. The application renders the error, unless it has answered."""
        assert self.cycle is not None
        self._state, self._deadline, self._unread = State.REFUSED, math.inf, b""
        if self.cycle.response_complete:
            self._linger()
        else:
            self.cycle.fail(error)

    # Time.

    def check_deadline(self, now: float) -> None:
        if now >= self._write_deadline:
            self._check_reader()
        elif now < self._deadline or self.transport.is_closing():
            return
        elif self._state is State.BODY:
            self._check_progress()
        elif self._state is State.HEAD and self._has_begun:
            self._refuse(RequestTimeout(f"The head was not complete after {self._timeouts.head:g} s."), b"")
        else:
            self._close()

    def _await_reader(self) -> None:
        self._n_unwritten = self.transport.get_write_buffer_size()
        self._write_deadline = self.loop.time() + self._timeouts.write

    def _check_reader(self) -> None:
        """Reset a connection whose client has read nothing since the last check."""
        if self.transport.get_write_buffer_size() < self._n_unwritten:
            self._await_reader()
        else:
            self.transport.abort()

    def _begin_interval(self) -> None:
        self._n_received = 0
        self._deadline = self.loop.time() + self._timeouts.body

    def _check_progress(self) -> None:
        assert self.cycle is not None
        min_bytes = self._timeouts.min_body_rate * self._timeouts.body
        if self._n_received >= min_bytes or self.flow.read_paused:
            self._begin_interval()
        elif self.cycle.response_complete:
            self._close()
        else:
            rate = f"{self._timeouts.min_body_rate:g} bytes/s"
            self._fail_body(RequestTimeout(f"The body arrived at less than {rate} for {self._timeouts.body:g} s."))

    def _probe_half_closed(self, has_probed: bool) -> None:
        """Find out whether a client that has ended its side still wants the response.

        An interim response, which every client must skip, makes the system of a client that is gone reset the
        connection.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_started or cycle.disconnected or cycle.scope["http_version"] != "1.1":
            return
        if not has_probed:
            self.transport.write(CONTINUE)
        elif is_reset(self.transport):
            self.transport.abort()
            return
        self.loop.call_later(PROBE_CHECK_SECONDS, self._probe_half_closed, True)
