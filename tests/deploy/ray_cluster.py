"""A program that runs a Ray cluster of two nodes on this machine until its stdin ends.

`python -m tests.deploy.ray_cluster PORT` prints `done` when the cluster is up, and after each command from stdin:
`deploy {…}` with the arguments of `deploy.ray.application:build`, `kill node`, or `add node`.
"""

import logging
import sys
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from deploy.ray.application import Arguments, build

# Room for two replicas of one CPU, whatever the machine has.
NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80_000_000}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    second = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    print("done", flush=True)
    for line in sys.stdin:
        command, _, arguments = line.partition(" ")
        if command == "deploy":
            serve.run(build(Arguments.model_validate_json(arguments)), name="dtem", route_prefix="/")
        elif command == "kill":
            cluster.remove_node(second, allow_graceful=False)
        elif command == "add":
            second = cluster.add_node(**NODE)
        print("done", flush=True)
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
