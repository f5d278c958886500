"""Repositories of the Hugging Face hub, downloaded to its cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from training.models.checkpoints.files import UnreadableCheckpoint


def downloaded(name: str) -> Path:
    """Return the folder of a repository (`owner/name` or `owner/name@revision`), from cache or network.

    Raises: UnreadableCheckpoint where it cannot be had.
    """
    repository, _, revision = name.partition("@")
    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = ["config.json", "preprocessor_config.json", "*.index.json", weights]
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except (OSError, ValueError) as err:
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise UnreadableCheckpoint(f"hf-hub:{name} cannot be downloaded: {reason}") from err
    return folder
