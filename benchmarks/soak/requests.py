"""Mixed requests: every kind of request that the service supports, with the allowed responses."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from benchmarks.load.http1 import make_request
from benchmarks.load.labelled_jpegs import LabelledJpeg
from benchmarks.load.open_loop import LOST, Call
from benchmarks.servers.partial_store import Variant, runnable

Check = Callable[[dict[str, Any]], bool]
BUSY = frozenset({429})
LATE = frozenset({429, 504})
# Statuses that the server may count for a client that disconnected.
UNSEEN = frozenset({200, 429, 499})
BOUNDARY = "mixed-requests"


def any_answer(answer: dict[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Request:
    """A request and its contract.

    statuses: allowed statuses. keeps_promise: whether the answer with status 200 matches the request.
    """

    kind: str
    call: Call
    statuses: frozenset[int]
    keeps_promise: Check = field(default=any_answer, repr=False)


class Mixture:
    """Random requests to one version; the same seed gives the same requests."""

    def __init__(self, manifest: dict[str, Any], jpegs: Sequence[LabelledJpeg], max_body_bytes: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._name, self._jpegs, self._max_body_bytes = manifest["name"], jpegs, max_body_bytes
        variants = runnable(manifest)
        self._fixed = [one for one in variants if one["r"] is not None]
        self._adapting = sorted(one["policy"] for one in variants if one["r"] is None)
        self._default_variant = (manifest["default"]["policy"], manifest["default"]["r"])
        adapting = {self._adaptive_policy: 4.0} if self._adapting else {}
        self._kinds: dict[Callable[[], Request], float] = {
            self._default: 4.0,
            self._fixed_rate: 30.0,
            self._allow_degrade: 6.0,
            self._max_r: 6.0,
            self._max_gmacs: 8.0,
            self._min_accuracy: 8.0,
            self._long_deadline: 8.0,
            self._short_deadline: 4.0,
            **adapting,
            self._valid_form: 5.0,
            self._form_with_broken_file: 2.0,
            self._v2: 6.0,
            self._v2_invalid_selector: 1.0,
            self._broken_image: 3.0,
            self._not_an_image: 2.0,
            self._too_many_pixels: 1.0,
            self._too_many_bytes: 0.5,
            self._invalid_selector: 4.0,
            self._unknown_model: 1.0,
            self._disconnects_during_body: 2.0,
            self._disconnects_after_body: 2.0,
        }

    def draw(self, n_requests: int) -> list[Request]:
        drawn = self._random.choices(list(self._kinds), list(self._kinds.values()), k=n_requests)
        return [make() for make in drawn]

    def _image(self) -> bytes:
        return self._random.choice(self._jpegs).data

    def _variant(self) -> Variant:
        return self._random.choice(self._fixed)

    def _post(
        self, kind: str, query: dict[str, Any], statuses: frozenset[int], check: Check = any_answer, body: bytes = b""
    ) -> Request:
        return Request(kind, Call(make_request(_path(query), body or self._image())), statuses, check)

    def _default(self) -> Request:
        return self._post("default", {}, BUSY | {200}, _ran(*self._default_variant))

    def _fixed_rate(self) -> Request:
        one = self._variant()
        return self._post("r", _selector(one), BUSY | {200}, _ran(one["policy"], one["r"]))

    def _allow_degrade(self) -> Request:
        one = self._variant()
        check = _within(one["policy"], one["r"], max(self._rates(one["policy"])))
        return self._post("allow_degrade", {**_selector(one), "allow_degrade": "true"}, BUSY | {200}, check)

    def _max_r(self) -> Request:
        one = self._variant()
        max_r = self._random.choice([r for r in self._rates(one["policy"]) if r >= one["r"]])
        check = _within(one["policy"], one["r"], max_r)
        return self._post("max_r", {**_selector(one), "max_r": max_r}, BUSY | {200}, check)

    def _max_gmacs(self) -> Request:
        one = self._variant()
        limit = round(one["gmacs"] * 1.01, 6)
        query = {"policy": one["policy"], "max_gmacs": limit}
        return self._post("max_gmacs", query, BUSY | {200}, lambda answer: bool(answer["gmacs"] <= limit))

    def _min_accuracy(self) -> Request:
        one = self._random.choice([one for one in self._fixed if one["accuracy"]] or [None])
        if one is None:
            # Without a measured accuracy no request can ask for one.
            return self._post("min_accuracy", {"min_accuracy": "0.5"}, frozenset({422}))
        floor = math.floor(one["accuracy"]["top1"] * 1e6) / 1e6
        query = {"policy": one["policy"], "min_accuracy": floor}

        def is_as_accurate(answer: dict[str, Any]) -> bool:
            return bool(answer["accuracy"]["top1"] >= floor)

        return self._post("min_accuracy", query, BUSY | {200}, is_as_accurate)

    def _long_deadline(self) -> Request:
        return self._with_deadline("deadline, 1 to 3 s", self._random.uniform(1000, 3000))

    def _short_deadline(self) -> Request:
        return self._with_deadline("deadline, 1 to 50 ms", self._random.uniform(1, 50))

    def _with_deadline(self, kind: str, deadline_ms: float) -> Request:
        policy = self._variant()["policy"]
        query = {"policy": policy, "deadline_ms": f"{deadline_ms:.0f}"}
        return self._post(kind, query, LATE | {200}, lambda answer: bool(answer["policy"] == policy))

    def _adaptive_policy(self) -> Request:
        policy = self._random.choice(self._adapting)
        return self._post("adaptive policy", {"policy": policy}, BUSY | {200}, _ran(policy, None))

    def _valid_form(self) -> Request:
        return self._form("form", [self._image() for _ in range(self._random.randint(1, 4))], [])

    def _form_with_broken_file(self) -> Request:
        return self._form("form with a broken file", [self._image(), self._image()], [self._image()[:300]])

    def _form(self, kind: str, good: list[bytes], broken: list[bytes]) -> Request:
        body = make_form(good + broken)
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        one = self._variant()

        def has_status_per_file(answer: dict[str, Any]) -> bool:
            found = [item.get("status", 200) for item in answer["results"]]
            return found == [200] * len(good) + [400] * len(broken)

        return Request(
            kind, Call(make_request(_path(_selector(one)), body, headers)), BUSY | {200}, has_status_per_file
        )

    def _v2(self) -> Request:
        one = self._variant()
        wanted = {"policy": one["policy"], "r": one["r"]}

        def ran(answer: dict[str, Any]) -> bool:
            return bool(wanted.items() <= answer["parameters"].items())

        return Request("v2", Call(self._infer(wanted)), BUSY | {200}, ran)

    def _v2_invalid_selector(self) -> Request:
        return Request("v2, invalid selector", Call(self._infer({"r": 1_000_001})), frozenset({422}))

    def _infer(self, parameters: dict[str, Any]) -> bytes:
        return make_infer_request(self._name, self._image(), parameters)

    def _broken_image(self) -> Request:
        data = self._image()
        cut = data[: self._random.randint(4, len(data) // 2)]
        return self._post("broken image", _selector(self._variant()), BUSY | {400}, body=cut)

    def _not_an_image(self) -> Request:
        return self._post(
            "not an image", _selector(self._variant()), BUSY | {415}, body=b"<!doctype html><html></html>"
        )

    def _too_many_pixels(self) -> Request:
        return self._post("too many pixels", {}, BUSY | {413}, body=make_png(30_000, 30_000))

    def _too_many_bytes(self) -> Request:
        return self._post("too many bytes", {}, frozenset({413}), body=bytes(self._max_body_bytes + 1))

    def _invalid_selector(self) -> Request:
        queries: list[dict[str, Any]] = [
            {"r": 1_000_001},
            {"r": "many"},
            {"r": self._default_variant[1] or 0, "max_gmacs": 1},
            {"max_gmacs": "0.000001"},
            {"max_gmacs": "nan"},
            {"min_accuracy": "1.5"},
            {"deadline_ms": -1},
            {"allow_degrade": "perhaps"},
            {"policy": "no-such"},
            {"top_k": 0},
            {"no_such": 1},
        ]
        return self._post("invalid selector", self._random.choice(queries), frozenset({422}))

    def _unknown_model(self) -> Request:
        return self._post("unknown model", {"model": "no-such"}, frozenset({404}))

    def _disconnects_during_body(self) -> Request:
        data = make_request(_path(_selector(self._variant())), self._image())
        return Request("client disconnects during the body", Call(data, len(data) - 100), frozenset({LOST}))

    def _disconnects_after_body(self) -> Request:
        data = make_request(_path(_selector(self._variant())), self._image())
        return Request("client disconnects after the body", Call(data, len(data)), frozenset({LOST}))

    def _rates(self, policy: str) -> list[int]:
        return [one["r"] for one in self._fixed if one["policy"] == policy]


def _path(query: dict[str, Any]) -> str:
    return f"/classify?{urlencode(query)}" if query else "/classify"


def _selector(variant: Variant) -> dict[str, Any]:
    return {"policy": variant["policy"], "r": variant["r"]}


def _ran(policy: str, r: int | None) -> Check:
    return lambda answer: (answer["policy"], answer["r"], answer["degraded"]) == (policy, r, False)


def _within(policy: str, r: int, max_r: int) -> Check:
    """Expect a rate within these bounds, and `degraded` exactly if it is not the requested one."""

    def check(answer: dict[str, Any]) -> bool:
        found: int = answer["r"]
        return bool(answer["policy"] == policy and r <= found <= max_r and answer["degraded"] == (found != r))

    return check


def make_form(files: Sequence[bytes]) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'.encode("ascii")
    return b"".join(head + data + b"\r\n" for data in files) + f"--{BOUNDARY}--\r\n".encode("ascii")


def make_infer_request(model: str, image: bytes, parameters: dict[str, Any]) -> bytes:
    """Return a request of the Open Inference Protocol, with the image as a binary tensor."""
    element = struct.pack("<I", len(image)) + image
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(element)}}
    document = {"parameters": parameters, "inputs": [tensor], "outputs": [{"name": "label"}]}
    head = json.dumps(document).encode("ascii")
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return make_request(f"/v2/models/{model}/infer", head + element, headers)


def make_png(width: int, height: int) -> bytes:
    """Return a PNG that declares this size but has hardly any pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
