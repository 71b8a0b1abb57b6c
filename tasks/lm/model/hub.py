"""Files of a folder, or of a repository on the Hub through its cache."""

from __future__ import annotations

import logging
from pathlib import Path

VALUE_HEAD = "value_head.safetensors"
_log = logging.getLogger(__name__)


def find_file(
    base: str | Path, name: str, revision: str = "main", token: str | bool | None = None
) -> Path | None:
    """A file of a folder, or of a repository on the Hub through its cache; None where there is none."""
    if Path(base).is_dir():
        path = Path(base) / name
        return path if path.is_file() else None
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(str(base), name, revision=revision, token=token))
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        if name == VALUE_HEAD and isinstance(error, errors.LocalEntryNotFoundError):
            _log.warning("%s of %s is not in the cache, and the Hub cannot be asked for it", name, base)
    return None  # of what else is amiss, loading the model tells
