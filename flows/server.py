"""The Prefect server behind a flow that is run by hand: whether it can be reached or started, in one line."""

import logging
import os
import ssl
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from prefect.settings import PREFECT_API_URL, PREFECT_HOME

from tasks.run.provenance import one_line, without_secrets

SECONDS_TO_CONNECT = 5.0
TIMEOUT = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"


def check() -> None:
    """Find out in seconds what Prefect would take minutes and pages to say.

    Raises:
        ConnectionError: the server that PREFECT_API_URL names (the variable or a profile) does not answer.
        OSError: without it: PREFECT_HOME, where the embedded server keeps its database, cannot be written to.
    """
    if url := PREFECT_API_URL.value():
        _knock(url)
    else:
        _check_home(Path(PREFECT_HOME.value()).expanduser())


def in_one_line(error: Exception) -> str:
    """What to do about an error of Prefect's own."""
    if "ephemeral" in str(error):
        return (
            f"Prefect's embedded server did not start in {os.environ[TIMEOUT]} s ({TIMEOUT}); start one "
            "(`prefect server start`) and name it in PREFECT_API_URL, or use `dvc repro`, which needs none"
        )
    if isinstance(error, OSError):  # ours, or one that says it all
        return one_line(error)
    return f"{one_line(error)} (STACKRL_TRACEBACK=1 shows the rest)"


def be_quiet() -> None:
    """Let our line be the last: Prefect would say that its embedded server stops."""
    logging.getLogger("prefect").setLevel(logging.WARNING)


def _knock(url: str) -> None:
    """Any answer will do, also one over an encryption that we know less of than Prefect does."""
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=SECONDS_TO_CONNECT).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError):
            line = f"Prefect at {without_secrets(url)} does not answer: {one_line(reason)} (PREFECT_API_URL)"
            raise ConnectionError(line) from None


def _check_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home):
            pass
    except OSError as error:
        line = f"Prefect's embedded server cannot write to {home}: {error.strerror} (PREFECT_HOME)"
        raise OSError(line) from None
