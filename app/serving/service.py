"""Service: the state of the running process, and the way of a request through it."""

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Sequence
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
from app.serving.engine import Engine, Outcomes
from app.serving.entry import Batch, Done, Entry
from app.serving.flight import Decoded, Flight
from app.serving.scheduler import Limits
from app.settings import Settings

logger = logging.getLogger(__name__)

STOP_SECONDS = 1.0  # nothing runs any more, unless it hangs
LAG_SMOOTHING = 0.1
NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Classified:
    """One image's answer, and how long its bytes took to become pixels. Units: seconds."""

    done: Done
    decode_seconds: float


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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watching: asyncio.Task[None] | None = None
        self._catalogue: Catalogue | None = None
        self._is_draining = False
        self._lag_seconds = 0.0
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
        deadline = None if chosen.deadline_seconds is None else exchange.started_at + chosen.deadline_seconds
        try:
            # Not timeout_at: the loop may have another clock than the engine.
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self.engine.clock())):
                with self.admission.admit(len(inputs)):
                    return await self._fly(chosen, inputs, deadline, exchange)
        except TimeoutError as error:
            raise DeadlinePassed("The deadline is past.") from error

    async def _fly(
        self, chosen: Selection, inputs: Sequence[bytes | Pixels], deadline: float | None, exchange: Exchange
    ) -> list[Classified | ServiceError]:
        def make_entry(pixels: Pixels, owner: Flight | None) -> Entry:
            return self._make_entry(chosen, pixels, deadline, exchange.request_id, owner)

        # Refused before the work of decoding, if there is no room now.
        self.engine.require_room([make_entry(NO_PIXELS, None) for _ in inputs])
        flight = Flight(asyncio.get_running_loop(), self.engine, len(inputs), make_entry)
        try:
            for place, data in enumerate(inputs):
                self._decoders.submit(flight.decode, place, self._decoding(data, chosen.model.manifest.input))
            await flight.landed
        finally:
            n_waiting, n_running = flight.leave()
            self.metrics.count_cancelled(n_waiting, n_running)
            exchange.decodes = [(item.started_at, item.seconds) for item in flight.decoded if isinstance(item, Decoded)]
        found = [item if isinstance(item, ServiceError) else Classified(item[1], item[0]) for item in flight.results()]
        exchange.runs = [_record(item.done, chosen) for item in found if isinstance(item, Classified)]
        exchange.refusals += [status_and_code(item)[1] for item in found if isinstance(item, ServiceError)]
        return found

    def _decoding(self, data: bytes | Pixels, rule: Input) -> Callable[[], Pixels]:
        if isinstance(data, bytes):
            return lambda: decode_image(data, rule, self.settings.max_pixels)
        return lambda: data

    def _make_entry(
        self, chosen: Selection, pixels: Pixels, deadline: float | None, request_id: str, owner: Flight | None
    ) -> Entry:
        """Make an entry; with a deadline, of the variants that an idle device would have the time for."""
        now = self.engine.clock()
        manifest, ladder = chosen.model.manifest, chosen.ladder
        if deadline is not None:
            deadline -= 2 * self._lag_seconds  # a request is seen, and its answer sent, by a loop as busy as this
            in_time = [v for v in ladder if now + self.engine.expected_seconds(v, 1) <= deadline]
            ladder = ladder if len(in_time) == len(ladder) else tuple(in_time) or ladder[-1:]
        return Entry(
            pixels,
            ladder,
            (manifest.name, manifest.version, chosen.policy),
            submitted_at=now,
            due=now + self.settings.patience_ms / 1e3 if deadline is None else deadline,
            deadline=deadline,
            request_id=request_id,
            owner=owner,
        )

    def _deliver(self, outcomes: Outcomes) -> None:
        """Bring outcomes from the engine's thread to those who wait, in one call for a whole batch."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._land, outcomes, self.engine.clock())

    def _land(self, outcomes: Outcomes, delivered_at: float) -> None:
        self._lag_seconds += LAG_SMOOTHING * (self.engine.clock() - delivered_at - self._lag_seconds)
        for flight, own in itertools.groupby(outcomes, key=lambda outcome: outcome[0].owner):
            if flight is not None:  # it has not left meanwhile
                flight.land(tuple(own))

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
        gmacs=gmacs,
        gmacs_saved=max(0.0, chosen.model.unmerged_gmacs - gmacs),
        is_degraded=done.is_degraded,
    )
