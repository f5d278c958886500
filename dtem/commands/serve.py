import os
from pathlib import Path

import click

from dtem.options import FILE, example

STORE, DEFAULT_MODEL = "model_store", "reference"
# A link to the folder at the top of the repository, so that a wheel carries it.
PACKAGED_STORE = Path(__file__).parents[1] / STORE


@click.command("serve", epilog=example("dtem serve", "DTEM_DEVICE=cuda dtem serve --port 9000 --store /srv/models"))
@click.option("--host", help="DTEM_HOST: address to listen on; default: 127.0.0.1")
@click.option("--port", type=click.IntRange(0, 65535), help="DTEM_PORT: TCP port, 0 for any free one; default: 8000")
@click.option(
    "--store",
    type=FILE,
    help="DTEM_MODEL_STORE: folder of models; default: ./model_store if there is one, else the reference model",
)
@click.option("--default-model", help="DTEM_DEFAULT_MODEL: model of requests that name none")
def command(host: str | None, port: int | None, store: Path | None, default_model: str | None) -> int:
    """Serve the models of a store.

    Every other setting is an environment variable: deploy/README.md has the table.
    """
    given = {"HOST": host, "PORT": port, "MODEL_STORE": store, "DEFAULT_MODEL": default_model}
    os.environ.update({f"DTEM_{name}": str(value) for name, value in given.items() if value is not None})
    os.environ.setdefault("DTEM_LOG_FORMAT", "text")
    if "DTEM_MODEL_STORE" not in os.environ:
        chosen = Path(STORE) if Path(STORE).is_dir() else PACKAGED_STORE
        os.environ["DTEM_MODEL_STORE"] = str(chosen)
        if (chosen / DEFAULT_MODEL).is_dir():
            os.environ.setdefault("DTEM_DEFAULT_MODEL", DEFAULT_MODEL)
    # The service measures its own time to start.
    from app.__main__ import main  # noqa: PLC0415

    return main()
