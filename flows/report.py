"""What a stage leaves in the Prefect UI: its metrics as a table, and the MLflow run that made them."""

import json
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.logging import get_run_logger

from tasks.run import tracking
from tasks.run.layout import Layout


def publish(layout: Layout, stage: str, outcome: str, parent: str) -> None:
    """Artifacts of one stage; a skipped one is linked to the run that made it, which has its fingerprint.

    The flow's own MLflow run `parent` gets the same link as a tag.

    They are ornaments: a failure to make them is logged and fails nothing.
    """
    try:
        run, slug = tracking.run_of(layout.fingerprint(stage)), stage.replace("_", "-")
        made_by = f"Made by MLflow run `{run}`." if run else "MLflow knows no run that made this."
        table = metrics_table(layout.artifact(stage, "metrics.json"))
        create_markdown_artifact(f"# {stage}: {outcome}\n\n{table}\n\n{made_by}", key=f"{slug}-metrics")
        if run:
            tracking.tag_parent(parent, stage, outcome, run)
            create_link_artifact(tracking.run_link(run), link_text=f"{stage} run", key=f"{slug}-run")
    except Exception as error:
        get_run_logger().warning("no artifacts of %s: %s", stage, error)


def metrics_table(path: Path) -> str:
    """A Markdown table of a metrics.json, or a sentence where there is none."""
    if not path.exists():
        return "No metrics."
    metrics = json.loads(path.read_text(encoding="utf-8"))
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])
