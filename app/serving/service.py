"""Service: the state of the process, and the path of a request through it."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Sequence

import numpy as np

from app.backends import ENGINES, Pixels
from app.errors import DeadlinePassed, EngineStalled, NotReady, ServiceError, ShuttingDown, status_and_code
from app.observability.metrics import Metrics
from app.observability.record import ImageResult, RequestRecord
from app.serving.admission import Admission
from app.serving.decoding import Decoders
from app.serving.engine import Engine
from app.serving.entry import Batch, Entry, Outcome, Outcomes, Reply
from app.serving.pending import Decoded, ImageJob, PendingRequest
from app.serving.scheduler import SchedulerLimits
from app.settings import Settings
from app.store.catalogue import Catalogue
from app.store.manifest import Input
from app.store.preprocessing import DecodeLimits, open_image
from app.store.selection import Selection

logger = logging.getLogger(__name__)

# Timeout for worker threads to end; longer only if one hangs.
STOP_SECONDS = 1.0
LAG_SMOOTHING = 0.1
NOT_DECODED = Decoded(np.empty((0, 0, 3), np.uint8), 0.0, 0.0)


class Service:
    """Ready from the first published catalogue until it drains."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        limits = SchedulerLimits(
            max_queue_images=settings.max_queue_images,
            max_batch_images=settings.max_batch_images,
            max_concurrent_batches=settings.max_concurrent_batches,
            max_delay_seconds=settings.max_batch_delay_ms / 1e3,
            is_padded=settings.is_padded,
        )
        self.engine = Engine(limits, self._deliver, self._observe)
        self.admission = Admission(settings.max_in_flight_images, self.engine.seconds_until_drained)
        self._decoders = Decoders(settings.n_decode_threads, settings.max_decode_bytes, self.engine.clock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watching: asyncio.Task[None] | None = None
        self._catalogue: Catalogue | None = None
        self._is_draining = False
        self._lag_seconds = 0.0
        metrics.watch(self.is_ready, self.engine, lambda: self.admission.n_images)

    def start(self) -> None:
        """Start the engine; its results are delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        self._decoders.start()
        self._watching = self._loop.create_task(self._watch())

    async def stop(self) -> None:
        self.drain()
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self.engine.stop, STOP_SECONDS)
        self._decoders.stop()

    def publish(self, catalogue: Catalogue) -> None:
        """Serve these models from now on. Requests in flight keep their variants."""
        self._catalogue = catalogue
        served = [(model.manifest.name, model.manifest.version) for model in catalogue.all_models()]
        graph_format = ENGINES[self.settings.engine].graph_format
        self.metrics.announce_models(served, graph_format, self.settings.device)
        default = catalogue.find(None, None).manifest
        is_configured = self.settings.default_model is not None
        self.metrics.announce_default(default.name, default.version, is_configured=is_configured)
        self.metrics.announce_refused(catalogue.count_refused())

    def drain(self) -> None:
        """Stop being ready. Later requests are still served, and their connections closed."""
        self._is_draining = True

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def is_ready(self) -> bool:
        return not self._is_draining and self._catalogue is not None and self.is_alive()

    def is_alive(self) -> bool:
        """Return whether all workers are alive and responsive."""
        return self.engine.is_responsive(self.settings.stall_seconds)

    def require_alive(self) -> None:
        """Raises: EngineStalled."""
        if not self.is_alive():
            raise self._stalled()

    def require_ready(self) -> Catalogue:
        """Return the catalogue, also while draining.

        Raises: NotReady, EngineStalled.
        """
        if self._catalogue is None:
            raise NotReady("The models are still being loaded and verified.", retry_after_seconds=1)
        self.require_alive()
        return self._catalogue

    def require_accepting(self) -> None:
        """Raises: ShuttingDown, NotReady, EngineStalled."""
        if self._is_draining:
            raise ShuttingDown("The service is shutting down.", retry_after_seconds=1)
        self.require_ready()

    async def infer(self, chosen: Selection, inputs: Sequence[bytes | Pixels], record: RequestRecord) -> list[Outcome]:
        """Decode the images of one request and run them. Each has its own result or error.

        inputs: image files, or pixels in the model's input size.
        Raises: QueueFull, DeadlineUnmeetable, DeadlinePassed, EngineStalled, ShuttingDown, for the whole request.
        """
        deadline = None if chosen.deadline_seconds is None else record.started_at + chosen.deadline_seconds
        try:
            # Not timeout_at: the clocks of the loop and the engine may differ.
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self.engine.clock())):
                with self.admission.admit(len(inputs)):
                    return await self._run(chosen, inputs, deadline, record)
        except TimeoutError as error:
            raise DeadlinePassed("The deadline has passed.") from error

    async def _run(
        self, chosen: Selection, inputs: Sequence[bytes | Pixels], deadline: float | None, record: RequestRecord
    ) -> list[Outcome]:
        def make_entry(decoded: Decoded, reply: Reply | None) -> Entry:
            return self._make_entry(chosen, decoded, deadline, record.request_id, reply)

        # Without room in the queue, refuse before decoding.
        self.engine.require_room([make_entry(NOT_DECODED, None) for _ in inputs])
        loop, max_pixels = asyncio.get_running_loop(), self.settings.max_request_pixels
        pending = PendingRequest(loop, self.engine, len(inputs), make_entry, max_pixels)
        try:
            for place, data in enumerate(inputs):
                self._decode(pending, place, data, chosen.model.manifest.input)
            await pending.completed
        finally:
            self._decoders.withdraw(pending)
            n_waiting, n_running = pending.cancel()
            self.metrics.count_cancelled(n_waiting, n_running)
            record.decodes = [(item.started_at, item.seconds) for item in pending.decoded if isinstance(item, Decoded)]
        outcomes = pending.results()
        record.results = [outcome for outcome in outcomes if isinstance(outcome, ImageResult)]
        record.refusals += [status_and_code(outcome)[1] for outcome in outcomes if isinstance(outcome, ServiceError)]
        return outcomes

    def _decode(self, pending: PendingRequest, place: int, data: bytes | Pixels, rule: Input) -> None:
        """Pass an image file to the decoders; pixels need none."""
        if isinstance(data, bytes):
            limits = DecodeLimits(self.settings.max_pixels, self.settings.max_decode_bytes)
            self._decoders.submit(ImageJob(pending, place, lambda: open_image(data, rule, limits)))
        else:
            pending.settle(place, lambda: Decoded(data, time.perf_counter(), 0.0))

    def _make_entry(
        self, chosen: Selection, decoded: Decoded, deadline: float | None, request_id: str, reply: Reply | None
    ) -> Entry:
        """Make an entry. With a deadline, keep only the variants that would meet it on an idle device."""
        now = self.engine.clock()
        manifest, ladder = chosen.model.manifest, chosen.ladder
        if deadline is not None:
            # The event loop adds its lag twice, before queueing and after the run.
            deadline -= 2 * self._lag_seconds
            in_time = [v for v in ladder if now + self.engine.expected_seconds(v, 1) <= deadline]
            ladder = ladder if len(in_time) == len(ladder) else tuple(in_time) or ladder[-1:]
        return Entry(
            decoded.pixels,
            ladder,
            (manifest.name, manifest.version, chosen.policy),
            submitted_at=now,
            due=now + self.settings.target_latency_ms / 1e3 if deadline is None else deadline,
            deadline=deadline,
            request_id=request_id,
            decode_seconds=decoded.seconds,
            decode_wait_seconds=decoded.wait_seconds,
            reply=reply,
        )

    def _deliver(self, outcomes: Outcomes) -> None:
        """Pass a batch's outcomes from a worker to the event loop, in one call."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._reply, outcomes, self.engine.clock())

    def _reply(self, outcomes: Outcomes, delivered_at: float) -> None:
        self._lag_seconds += LAG_SMOOTHING * (self.engine.clock() - delivered_at - self._lag_seconds)
        for reply, of_request in itertools.groupby(outcomes, key=lambda outcome: outcome[0].reply):
            # None if the request was cancelled.
            if reply is not None:
                reply(tuple(of_request))

    def _observe(self, batch: Batch, seconds: float) -> None:
        name, _, policy = batch.entries[0].family
        self.metrics.observe_run((name, policy, batch.variant.rate_label), len(batch.entries), seconds)

    def _stalled(self) -> EngineStalled:
        detail = f"The engine has stopped, or a batch has run for over {self.settings.stall_seconds:g} s."
        return EngineStalled(detail, retry_after_seconds=math.ceil(self.settings.stall_seconds))

    async def _watch(self) -> None:
        """Fail all requests in flight once a worker hangs or has died."""
        while True:
            await asyncio.sleep(self.settings.stall_seconds / 8)
            if not self.is_alive() and (n_images := self.engine.abandon(self._stalled())):
                logger.error("the engine does not respond; refused %d images in flight", n_images)
