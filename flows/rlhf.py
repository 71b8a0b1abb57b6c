"""The story in eight calls: `python -m flows.rlhf [--preset P] [--target STAGE] [--force] [key=value …]`."""

import argparse
import os
import sys

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import ValidationError

from flows import server
from flows.road import Options, Road
from tasks.run.layout import STAGES
from tasks.run.streams import settle

AS_IT_STANDS = Options()  # params.yaml unchanged, all stages


@flow(name="rlhf", task_runner=ThreadPoolTaskRunner(max_workers=1))  # one machine: one training at a time
def rlhf(options: Options = AS_IT_STANDS) -> State:
    """A StackExchange dump in, an evaluated and registered policy out. DVC decides what has to run."""
    with Road(options) as step:
        data = step("data")
        pack = step("pack", data)
        sft = step("sft", pack)
        reward = step("reward", pack, sft)
        reward_eval = step("reward_eval", pack, reward)
        ppo = step("ppo", pack, sft, reward, reward_eval)
        policy_eval = step("policy_eval", pack, sft, reward, reward_eval, ppo)
        step("register", sft, reward, reward_eval, ppo, policy_eval)
    return step.verdict


def main(arguments: list[str] | None = None) -> int:
    """Run the flow here, without PREFECT_API_URL on a server of its own; 0, 1 and why, or 130."""
    parser = argparse.ArgumentParser(prog="python -m flows.rlhf", description=__doc__)
    parser.add_argument("--preset", help="write params.yaml from this preset first")
    parser.add_argument("--target", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--force", action="store_true", help="run every stage, changed or not")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --preset")
    try:
        options = Options(**vars(parser.parse_args(arguments)))
    except ValidationError as error:
        print(f"stackrl: rlhf: {error.errors()[0]['msg']}", file=sys.stderr)
        return 1
    try:
        server.check()
        state = rlhf(options, return_state=True)
    except KeyboardInterrupt:  # after a SIGTERM Prefect ends the process by the same signal
        print("stackrl: rlhf: stopped; run it again to go on", file=sys.stderr)
        return 130
    except Exception as error:  # Prefect's own: what a stage or the road meets is in the state
        if os.environ.get("STACKRL_TRACEBACK"):
            raise
        print(f"stackrl: rlhf: {server.in_one_line(error)}", file=sys.stderr)
        return 1
    finally:
        server.be_quiet()
    print(f"stackrl: rlhf: {state.message}", file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    settle()
    sys.exit(main())
