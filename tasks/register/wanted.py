"""The models that a run wants registered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.register import lineage
from tasks.register.holdings import Holding, Version
from tasks.register.recipe import MODELS, Recipe
from tasks.run.layout import Layout

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from params.schema import Params


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that should be registered: ``Wanted("stackrl-sft", "….dir", recipe, folder)``.

    Attributes:
        name: in the registry.
        md5: of its folder; empty where neither dvc.lock nor the disk knows it.
        recipe: how it is to be used.
        folder: where it lies, pulled or not.
    """

    name: str
    md5: str
    recipe: Recipe
    folder: Path

    def found(self, held: Mapping[str, Holding], client: MlflowClient | None = None) -> Version | None:
        """The newest whole version of it."""
        return held[self.name].find(self.md5, self.recipe.digest, client)


def models_of(params: Params, layout: Layout) -> list[Wanted]:
    """The three, the policy last."""
    locked, found = lineage.locked_md5s(layout), []
    for kind, stage in MODELS.items():
        folder = layout.artifact(stage, "model")
        md5 = locked.get(f"artifacts/{stage}/model") or (
            lineage.folder_md5(folder) if (folder / "config.json").is_file() else ""
        )
        found.append(Wanted(f"{params.register.prefix}-{kind}", md5, Recipe.of(kind, params), folder))
    return found
