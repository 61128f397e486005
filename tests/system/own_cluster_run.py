"""A small driver with a cluster of its own, as the commands have it: prints its processes, then waits for its actor.

With the argument `return` it leaves the cluster at once.
"""

import json
import os
import sys
import time

import psutil
import ray

from megatron_fipo.driver.cluster import ray_cluster
from megatron_fipo.driver.cluster_loss import leave_if_lost
from megatron_fipo.driver.ray_wait import wait_for_one
from megatron_fipo.errors import UserError, ray_logs


def main() -> int:
    class Sleeper:
        def pid(self) -> int:
            return os.getpid()

        def hub_offline(self) -> str | None:
            return os.environ.get("HF_HUB_OFFLINE")

        def sleep(self) -> None:
            time.sleep(1000)

    try:
        with ray_cluster(None, workers=2, log=print):
            actor = ray.remote(Sleeper).remote()
            pid = ray.get(actor.pid.remote())
            family = [child.pid for child in psutil.Process().children(recursive=True)]
            print(
                json.dumps(
                    {
                        "actor": pid,
                        "hub_offline": ray.get(actor.hub_offline.remote()),
                        "family": family,
                        "logs": ray_logs(),
                        "address": ray.get_runtime_context().gcs_address,
                        "cpus": ray.cluster_resources()["CPU"],
                    }
                ),
                flush=True,
            )
            if sys.argv[1:] != ["return"]:
                wait_for_one([actor.sleep.remote()])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    leave_if_lost(code)
    sys.exit(code)
