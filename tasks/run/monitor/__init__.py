"""Whether a rising score is a better policy: what is measured on responses, and when that is a finding."""

from tasks.run.monitor.look import Look
from tasks.run.monitor.rules import Thresholds, findings_of, gain

__all__ = ["Look", "Thresholds", "findings_of", "gain"]
