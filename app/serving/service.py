"""Service: the state of the running process, and the way of a request through it."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from app.backends import Logits, Pixels
from app.catalogue import Catalogue, ServedVariant
from app.errors import NotReady, ServiceError, ShuttingDown, status_and_code
from app.images import decode_image
from app.manifest import Input
from app.metrics import Exchange, Metrics
from app.selection import Selection
from app.serving.admission import Admission
from app.serving.engine import Engine, Inference
from app.settings import Settings

STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Classified:
    """One image's answer; what it kept and cost where that depends on the image. Units: GMACs.

    Shapes: logits (classes,)
    """

    logits: Logits
    tokens: list[int] | None
    gmacs: float | None
    batch_size: int
    decode_seconds: float


Outcome = Classified | ServiceError


@dataclass(frozen=True)
class Decoded:
    pixels: Pixels
    seconds: float


class Service:
    """Not ready until a catalogue is published, and not any more once it drains."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.admission = Admission(settings.max_queue_images)
        self.engine = Engine(settings.max_batch_images)
        self._decoders = ThreadPoolExecutor(settings.n_decode_threads, thread_name_prefix="decode")
        self._catalogue: Catalogue | None = None
        self._is_draining = False
        metrics.watch(self.is_ready, lambda: self.engine.n_waiting, lambda: self.admission.n_images)

    def start(self) -> None:
        self.engine.start()

    def stop(self) -> None:
        self.drain()
        self.engine.stop(STOP_SECONDS)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def publish(self, catalogue: Catalogue) -> None:
        """Serve these models from now on."""
        for model in catalogue.all_models():
            name, version = model.manifest.name, model.manifest.version
            self.metrics.announce_model(name, version, self.settings.format, self.settings.device)
        self._catalogue = catalogue

    def drain(self) -> None:
        """Take no new requests; those inside are finished."""
        self._is_draining = True

    def is_ready(self) -> bool:
        return not self._is_draining and self._catalogue is not None and self._is_responsive()

    def _is_responsive(self) -> bool:
        return self.engine.is_responsive(self.settings.stall_seconds)

    def require_ready(self) -> Catalogue:
        """Return what is served.

        Raises: NotReady, ShuttingDown.
        """
        if self._is_draining:
            raise ShuttingDown("The service is shutting down.", retry_after_seconds=1)
        if self._catalogue is None:
            raise NotReady("The models are still being loaded and verified.", retry_after_seconds=1)
        if not self._is_responsive():
            raise NotReady("The engine does not answer.", retry_after_seconds=self.admission.seconds_until_empty())
        return self._catalogue

    async def classify(self, chosen: Selection, inputs: Sequence[bytes | Pixels], exchange: Exchange) -> list[Outcome]:
        """Decode and classify the images of one request, each with its own result or error.

        Shapes: pixels (H, W, 3), as the model's input rule says.
        Raises: QueueFull, InferenceFailed, ShuttingDown for all of them together.
        """
        with self.admission.admit(len(inputs)):
            rule = chosen.model.manifest.input
            decoded = await asyncio.gather(*(self._decode(data, rule) for data in inputs))
            good = [item for item in decoded if isinstance(item, Decoded)]
            exchange.decode_seconds = [item.seconds for item in good]
            exchange.refusals += [status_and_code(item)[1] for item in decoded if isinstance(item, ServiceError)]
            if not good:
                return [item for item in decoded if isinstance(item, ServiceError)]
            inference = await self._infer(chosen.variant, good)
        exchange.queue_seconds, exchange.inference_seconds = inference.queue_seconds, inference.inference_seconds
        exchange.n_images = len(good)
        answers = iter([_classified(item, inference, place) for place, item in enumerate(good)])
        outcomes = [item if isinstance(item, ServiceError) else next(answers) for item in decoded]
        left = chosen.variant.entry.tokens[-1]  # of an adaptive variant a mean; then each image has its own
        exchange.kept_tokens = [
            left if item.tokens is None else item.tokens[-1] for item in outcomes if isinstance(item, Classified)
        ]
        return outcomes

    async def _decode(self, data: bytes | Pixels, rule: Input) -> Decoded | ServiceError:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, _time_decoding, data, rule, self.settings.max_pixels)

    async def _infer(self, variant: ServedVariant, decoded: Sequence[Decoded]) -> Inference:
        pixels = np.stack([item.pixels for item in decoded])
        inference = await asyncio.wrap_future(self.engine.submit(variant, pixels))
        self.admission.learn(inference.inference_seconds, len(decoded))
        return inference


def _time_decoding(data: bytes | Pixels, rule: Input, max_pixels: int) -> Decoded | ServiceError:
    """Pixels are decoded already, and pass."""
    started_at = time.perf_counter()
    try:
        pixels = data if isinstance(data, np.ndarray) else decode_image(data, rule, max_pixels)
    except ServiceError as error:
        return error
    return Decoded(pixels, time.perf_counter() - started_at)


def _classified(decoded: Decoded, inference: Inference, place: int) -> Classified:
    answer = inference.answer
    return Classified(
        answer.logits[place],
        None if answer.tokens is None else answer.tokens[place].tolist(),
        None if answer.gmacs is None else float(answer.gmacs[place]),
        inference.batch_sizes[place],
        decoded.seconds,
    )
