"""A graph behind plain FastAPI: a thread pool, and uvicorn with its defaults.

`python -m benchmarks.overhead.plain_fastapi --published model_store/reference/5
--graph tome-r16.onnx --threads 2 --port 8001`
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from app.store.manifest import MANIFEST_FILE, Manifest
from app.store.preprocessing import decode_image
from benchmarks.timing import open_session

MAX_PIXELS = 50_000_000


def create_app(published: Path, graph: str, n_threads: int) -> FastAPI:
    app = FastAPI()
    manifest = Manifest.model_validate_json((published / MANIFEST_FILE).read_bytes())
    session = open_session(published / graph, n_threads)

    def predict(data: bytes) -> list[dict[str, Any]]:
        pixels = decode_image(data, manifest.input, MAX_PIXELS)
        logits = session.run([manifest.output.name], {manifest.input.name: pixels[None]})[0][0]
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = probabilities.argsort()[::-1][:5]
        return [{"label": manifest.labels[i], "probability": float(probabilities[i])} for i in best]

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        return {"predictions": await run_in_threadpool(predict, await request.body())}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True)
    parser.add_argument("--graph", required=True, help="a file of the version")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(create_app(options.published, options.graph, options.threads), port=options.port)


if __name__ == "__main__":
    main()
