"""The template of questions and answers, by the path that scripts know (:mod:`tasks.lm.model.template`)."""

from tasks.lm.model.template import *  # noqa: F403
