"""Questions -> tokens."""

from tasks.pack.stage import run

__all__ = ["run"]
