"""`champion` moves by hand: ``python -m tasks.register promote stackrl-policy 3``."""

from __future__ import annotations

import argparse
import sys

from tasks.register import holdings
from tasks.run import tracking
from tasks.run.layout import Layout


def promote(layout: Layout, name: str, version: str) -> None:
    """Give `champion` to a version by hand.

    Raises:
        ValueError: there is no such version, or its files are gone.
    """
    from mlflow.exceptions import MlflowException

    client = tracking.connect(layout)
    try:
        client.get_model_version(name, version)
        versions = holdings.by_client(client, [name])[name].versions
        found = next(one for one in versions if one.number == int(version))
        if not found.is_whole(client):
            raise ValueError(f"{name} {version}: its files are gone from {found.place}")
        client.set_registered_model_alias(name, "champion", version)
    except MlflowException as error:
        raise ValueError(f"{name} {version}: {' '.join(str(error).split())}") from None


def main(arguments: list[str] | None = None) -> int:
    """`promote NAME VERSION`; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tasks.register", description=__doc__)
    parser.add_argument("action", choices=["promote"])
    parser.add_argument("name", help="registered model, e.g. stackrl-policy")
    parser.add_argument("version")
    options = parser.parse_args(arguments)
    try:
        promote(Layout.here(), options.name, options.version)
    except (ValueError, OSError) as error:
        print(f"stackrl: {error}", file=sys.stderr)
        return 1
    print(f"stackrl: champion of {options.name} is version {options.version}")
    return 0
