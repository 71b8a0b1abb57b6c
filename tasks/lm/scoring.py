"""Scores of whole documents, by the path that scripts know: see :mod:`tasks.lm.heads.scores`."""

from tasks.lm.heads.scores import *  # noqa: F403
