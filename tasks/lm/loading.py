"""Loading and saving of models, by the path that scripts know: see :mod:`tasks.lm.model.loading`."""

from tasks.lm.model.loading import *  # noqa: F403
