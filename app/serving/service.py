"""Service: the state of the running process, and the way of a request through it."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from app.backends import Pixels
from app.catalogue import Catalogue
from app.errors import DeadlinePassed, EngineStalled, NotReady, ServiceError, ShuttingDown, status_and_code
from app.images import decode_image
from app.manifest import Input
from app.metrics import Exchange, Metrics, Run
from app.selection import Selection
from app.serving.admission import Admission
from app.serving.engine import Engine, Outcome
from app.serving.entry import Batch, Done, Entry
from app.serving.scheduler import Limits
from app.settings import Settings

logger = logging.getLogger(__name__)

STOP_SECONDS = 1.0  # nothing runs any more, unless it hangs
NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Classified:
    """One image's answer, and how long its bytes took to become pixels. Units: seconds."""

    done: Done
    decode_seconds: float


@dataclass(frozen=True)
class Decoded:
    pixels: Pixels
    started_at: float
    seconds: float


Replies = dict[Entry, "asyncio.Future[Outcome]"]


class Service:
    """Not ready until a catalogue is published, and not any more once it drains."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        limits = Limits(
            max_queue_images=settings.max_queue_images,
            max_batch_images=settings.max_batch_images,
            n_lanes=settings.n_lanes,
            wait_seconds=settings.batch_wait_ms / 1e3,
            is_padded=settings.is_padded,
        )
        self.engine = Engine(limits, self._deliver, self._observe)
        self.admission = Admission(settings.max_inside_images, self.engine.seconds_until_drained)
        self._decoders = ThreadPoolExecutor(settings.n_decode_threads, thread_name_prefix="decode")
        self._replies: Replies = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watching: asyncio.Task[None] | None = None
        self._catalogue: Catalogue | None = None
        self._is_draining = False
        metrics.watch(self.is_ready, self.engine, lambda: self.admission.n_images)

    def start(self) -> None:
        """For the event loop, which every answer comes back to."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        self._watching = self._loop.create_task(self._watch())

    async def stop(self) -> None:
        self.drain()
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self.engine.stop, STOP_SECONDS)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def publish(self, catalogue: Catalogue) -> None:
        """Serve these models from now on; requests inside keep the variants they have."""
        self._catalogue = catalogue
        served = [(model.manifest.name, model.manifest.version) for model in catalogue.all_models()]
        self.metrics.announce_models(served, self.settings.format, self.settings.device)

    def drain(self) -> None:
        """Say that no more requests are wanted. Those that come all the same are served, and end their connection."""
        self._is_draining = True

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def is_ready(self) -> bool:
        return not self._is_draining and self._catalogue is not None and self.is_alive()

    def is_alive(self) -> bool:
        """Tell whether the engine's thread lives and does not hang."""
        return self.engine.is_responsive(self.settings.stall_seconds)

    def require_alive(self) -> None:
        """Raises: EngineStalled."""
        if not self.is_alive():
            raise self._stalled()

    def require_ready(self) -> Catalogue:
        """Return what is served, while draining too.

        Raises: NotReady, EngineStalled.
        """
        if self._catalogue is None:
            raise NotReady("The models are still being loaded and verified.", retry_after_seconds=1)
        self.require_alive()
        return self._catalogue

    def require_wanting_requests(self) -> None:
        """Raises: ShuttingDown, NotReady, EngineStalled."""
        if self._is_draining:
            raise ShuttingDown("The service is shutting down.", retry_after_seconds=1)
        self.require_ready()

    async def classify(
        self, chosen: Selection, inputs: Sequence[bytes | Pixels], exchange: Exchange
    ) -> list[Classified | ServiceError]:
        """Decode and classify the images of one request, each with its own result or error.

        inputs: files, or pixels of the model's size.
        Raises: QueueFull, DeadlineUnmeetable, DeadlinePassed, EngineStalled, ShuttingDown for all of them.
        """
        arrived_at, deadline = exchange.started_at, None
        if chosen.deadline_seconds is not None:
            deadline = arrived_at + chosen.deadline_seconds
        try:
            # Not timeout_at: the loop may have another clock than the engine.
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self.engine.clock())):
                with self.admission.admit(len(inputs)):
                    # Refused before the work of decoding, if there is no room now.
                    self.engine.require_room([self._entry(chosen, NO_PIXELS, deadline, exchange) for _ in inputs])
                    return await self._classify(chosen, inputs, deadline, exchange)
        except TimeoutError as error:
            raise DeadlinePassed("The deadline is past.") from error

    async def _classify(
        self, chosen: Selection, inputs: Sequence[bytes | Pixels], deadline: float | None, exchange: Exchange
    ) -> list[Classified | ServiceError]:
        rule = chosen.model.manifest.input
        decoded = await asyncio.gather(*(self._decode(data, rule) for data in inputs))
        good = [item for item in decoded if isinstance(item, Decoded)]
        exchange.decodes = [(item.started_at, item.seconds) for item in good]
        outcomes = iter(await self._infer([self._entry(chosen, item.pixels, deadline, exchange) for item in good]))
        found = [item if isinstance(item, ServiceError) else _answered(item, next(outcomes)) for item in decoded]
        exchange.runs = [_record(item.done, chosen) for item in found if isinstance(item, Classified)]
        exchange.refusals += [status_and_code(item)[1] for item in found if isinstance(item, ServiceError)]
        return found

    async def _decode(self, data: bytes | Pixels, rule: Input) -> Decoded | ServiceError:
        if not isinstance(data, bytes):
            return Decoded(data, time.perf_counter(), 0.0)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, _time_decoding, data, rule, self.settings.max_pixels)

    def _entry(self, chosen: Selection, pixels: Pixels, deadline: float | None, exchange: Exchange) -> Entry:
        """Make an entry; with a deadline, of the variants that an idle device would have the time for."""
        now = self.engine.clock()
        manifest = chosen.model.manifest
        ladder = chosen.ladder
        if deadline is not None:
            in_time = [v for v in ladder if now + self.engine.expected_seconds(v, 1) <= deadline]
            ladder = tuple(in_time) or ladder[-1:]
        return Entry(
            pixels,
            ladder,
            (manifest.name, manifest.version, chosen.policy),
            submitted_at=now,
            due=now + self.settings.patience_ms / 1e3 if deadline is None else deadline,
            deadline=deadline,
            request_id=exchange.request_id,
        )

    async def _infer(self, entries: Sequence[Entry]) -> list[Outcome]:
        """Queue entries and wait for all of them; if the caller leaves, those that have not begun are taken back."""
        if not entries:
            return []
        loop = asyncio.get_running_loop()
        replies: Replies = {entry: loop.create_future() for entry in entries}
        self._replies.update(replies)
        try:
            self.engine.submit(entries)
            return list(await asyncio.gather(*replies.values()))
        finally:
            left = [entry for entry in entries if self._replies.pop(entry, None) is not None]
            if left:
                n_waiting = self.engine.withdraw(left)
                self.metrics.count_cancelled(n_waiting, len(left) - n_waiting)

    def _deliver(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        """Bring outcomes from the engine's thread to those who wait, in one call for a whole batch."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._resolve, outcomes)

    def _resolve(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        for entry, outcome in outcomes:
            reply = self._replies.pop(entry, None)
            if reply is not None and not reply.done():
                reply.set_result(outcome)

    def _observe(self, batch: Batch, seconds: float) -> None:
        name, _, policy = batch.entries[0].family
        self.metrics.observe_run((name, policy, batch.variant.label), len(batch.entries), seconds)

    def _stalled(self) -> EngineStalled:
        detail = f"The engine has ended, or a run lasts longer than {self.settings.stall_seconds:g} s."
        return EngineStalled(detail, retry_after_seconds=math.ceil(self.settings.stall_seconds))

    async def _watch(self) -> None:
        """Give up on those inside once the engine hangs or is dead: they would wait in vain."""
        while True:
            await asyncio.sleep(self.settings.stall_seconds / 8)
            if not self.is_alive() and (n_images := self.engine.abandon(self._stalled())):
                logger.error("the engine does not answer; %d images inside were refused", n_images)


def _time_decoding(data: bytes, rule: Input, max_pixels: int) -> Decoded | ServiceError:
    started_at = time.perf_counter()
    try:
        pixels = decode_image(data, rule, max_pixels)
    except ServiceError as error:
        return error
    return Decoded(pixels, started_at, time.perf_counter() - started_at)


def _answered(decoded: Decoded, outcome: Outcome) -> Classified | ServiceError:
    return outcome if isinstance(outcome, ServiceError) else Classified(outcome, decoded.seconds)


def _record(done: Done, chosen: Selection) -> Run:
    entry = done.variant.entry
    gmacs = entry.gmacs if done.gmacs is None else done.gmacs
    return Run(
        variant=(chosen.model.manifest.name, chosen.policy, done.variant.label),
        batch_size=done.batch_size,
        started_at=done.started_at,
        queue_seconds=done.queue_seconds,
        inference_seconds=done.inference_seconds,
        kept_tokens=entry.tokens[-1] if done.tokens is None else done.tokens[-1],
        gmacs_saved=max(0.0, chosen.model.unmerged_gmacs - gmacs),
        is_degraded=done.is_degraded,
    )
