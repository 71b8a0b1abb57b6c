"""The three models into the MLflow registry, each version tagged with all it was made from.

A model's identity is the md5 of its folder in dvc.lock: registered twice, it is one version. The alias
`candidate` stands on this run's models; `champion` too, when there is none yet and policy_eval finds the
policy worthy; its reasons are tags of the policy's version. Afterwards it moves by hand only:
``python -m tasks.register promote stackrl-policy 3``. What an experiment of DVC registers takes no alias.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from tasks.register import holdings, lineage
from tasks.register.holdings import Holding
from tasks.register.wanted import Wanted, models_of
from tasks.run import moved, tracking
from tasks.run.files import write_json
from tasks.run.layout import Layout, StageResult

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from params.schema import Params

NOTHING_TO_DO = "all registered before, up to date"
_log = logging.getLogger(__name__)


def standing(params: Params, layout: Layout) -> StageResult | None:
    """The stage's result where the registry has everything already; None where there is something to do.

    Raises:
        ConnectionError: the registry does not answer.
    """
    wanted = models_of(params, layout)
    held, client = _look(layout, [one.name for one in wanted])
    if held is None or not all(one.found(held, client) for one in wanted):
        return None
    if wanted[-1].found(held, client).verdict != lineage.verdict(layout):
        return None
    if trial() is None:
        due = _due(layout, wanted, held, client)
        if any(held[name].aliases.get(alias) != number for (name, alias), number in due.items()):
            return None
        if any(held[one.name].lost_aliases(client) for one in wanted):
            return None
    return replace(_result(layout, wanted), note=NOTHING_TO_DO)


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: a model folder is missing or cannot be loaded, a registered model says something else than
            the run's, or an alias names a version whose files are gone.
        ConnectionError: the registry does not answer.
    """
    with nullcontext() if tracking.active_run() else tracking.stage_run("register", {}, layout):
        client, wanted = tracking.connect(layout), models_of(params, layout)
        held = holdings.by_client(client, [one.name for one in wanted])
        if missing := [one for one in wanted if not one.found(held, client)]:
            _log_models(params, layout, client, missing, held)
            held = holdings.by_client(client, [one.name for one in wanted])
        _set_verdict(layout, client, wanted[-1], held)
        _set_aliases(layout, client, wanted, held)
    return _result(layout, wanted)


def trial() -> str | None:
    """The name of DVC's experiment that this stage is part of; None outside one."""
    return os.environ.get("DVC_EXP_NAME") or None


def _look(layout: Layout, names: list[str]) -> tuple[dict[str, Holding] | None, MlflowClient | None]:
    """What the registry holds, and the client that was needed; None where it must be made or mended first."""
    if (store := tracking.own_store(layout)) is not None:
        try:
            is_off = not store.exists() or moved.old_places(store, layout.home)
            if is_off or holdings.is_deleted(store, tracking.EXPERIMENT):
                return None, None
            return holdings.in_file(store, names), None
        except sqlite3.Error as error:
            _log.debug("%s: %s", store, error)  # MLflow's client reads it, or says what is wrong
    client = tracking.connect(layout)
    return holdings.by_client(client, names), client


def _log_models(
    params: Params,
    layout: Layout,
    client: MlflowClient,
    missing: Iterable[Wanted],
    held: Mapping[str, Holding],
) -> None:
    from tasks.register import models

    for one in missing:
        if not (one.folder / "config.json").is_file():
            stage = one.folder.parent.name
            help_ = f"`dvc pull` brings it, or `dvc repro {stage}` makes it"
            raise ValueError(f"artifacts/{stage}/model holds no model; {help_}")
    locked = lineage.locked_md5s(layout)
    tags = lineage.tags(params, layout, locked) | ({holdings.TRIAL: trial()} if trial() else {})
    for one in missing:
        if any(version.md5 == one.md5 for version in held[one.name].versions):
            _log.warning("register: %s is logged anew: what was registered is gone or out of date", one.name)
        models.register(layout, client, one, tags)
    models.log_pipeline(layout, client, lineage.sources(locked))


def _due(
    layout: Layout, wanted: list[Wanted], held: Mapping[str, Holding], client: MlflowClient | None
) -> dict[tuple[str, str], int]:
    """(name, alias) -> version of the aliases that this run's models take by themselves, the policy's last.

    SFT and reward model of the champion are champions too.
    """
    numbers = {one.name: one.found(held, client).number for one in wanted}
    policy = wanted[-1]
    champion = held[policy.name].aliases.get("champion")
    is_same = champion is not None and held[policy.name].md5(champion) == policy.md5
    is_champion = is_same or (champion is None and lineage.is_champion(layout))
    due = {}
    for name, number in numbers.items():
        due[name, "candidate"] = number
        if is_champion and "champion" not in held[name].aliases:
            due[name, "champion"] = number
    return due


def _set_verdict(
    layout: Layout, client: MlflowClient, policy: Wanted, held: Mapping[str, Holding]
) -> None:
    """Let the policy's version say what policy_eval says of it now, whatever it said before."""
    version, said = policy.found(held, client), lineage.verdict(layout)
    for key, text in said.items():
        if version.verdict.get(key) != text:
            client.set_model_version_tag(policy.name, str(version.number), key, text)
    if not lineage.is_champion(layout) and held[policy.name].aliases.get("champion") == version.number:
        _log.warning(
            "register: %s@champion stays version %d by hand alone: %s",
            policy.name, version.number, said[holdings.REASONS],
        )  # fmt: skip


def _set_aliases(
    layout: Layout, client: MlflowClient, wanted: list[Wanted], held: Mapping[str, Holding]
) -> None:
    """Where they should be.

    Raises:
        ValueError: an alias that this run may not move names a version whose files are gone.
    """
    due = {} if trial() else _due(layout, wanted, held, client)
    lost = []
    for one in wanted:
        for alias, number in held[one.name].lost_aliases(client).items():
            new = one.found(held, client).number
            if held[one.name].md5(number) == one.md5:  # the same weights, logged anew
                due[one.name, alias] = new
            elif (one.name, alias) not in due:
                lost.append(
                    f"{one.name}@{alias} is version {number}, whose files are gone; bring them back, "
                    f"or `python -m tasks.register promote {one.name} {new}`"
                )
    for (name, alias), number in due.items():
        client.set_registered_model_alias(name, alias, str(number))
    if lost:
        raise ValueError(lost[0])


def _result(layout: Layout, wanted: list[Wanted]) -> StageResult:
    write_json(layout.artifact("register", "registered.json"), {one.name: one.md5 for one in wanted})
    worthy = float(lineage.is_champion(layout))
    return StageResult({"models": float(len(wanted)), "champion": worthy})
