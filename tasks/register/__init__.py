"""Models on disk -> MLflow registry, and what the registry says is true."""

from tasks.register.command import main, promote
from tasks.register.holdings import IDENTITY
from tasks.register.lineage import folder_md5
from tasks.register.stage import run, standing

__all__ = ["IDENTITY", "folder_md5", "main", "promote", "run", "standing"]
