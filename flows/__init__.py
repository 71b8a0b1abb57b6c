"""WHEN each stage runs: the only place that knows Prefect."""

import os
import warnings

from tasks.run import user

user.settle()  # before Prefect asks for the home
warnings.filterwarnings("ignore", "Failed to create the Prefect home")  # flows.server says it in one line

os.environ.setdefault("DO_NOT_TRACK", "true")
# an embedded server that is started for the first time on a loaded machine takes half a minute and more
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
