"""Parallel layouts across nodes: the numbers of one rank on one machine, from a run that joins Ray on all nodes of a job."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.cluster.slurm_conf import LOGIN
from tests.system.runs import ROOT, TINY, command, iterations, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# Ray counts one CPU per node, so that no node gets two of the ranks and engines of a run.
RAY = """\
#!/bin/bash
srun --overlap bash -c '
ray=({python} -m ray.scripts.scripts start --block --num-cpus=1 --object-store-memory=200000000)
ray+=(--node-ip-address=$(hostname --ip-address) --disable-usage-stats)
[ $SLURM_NODEID = 0 ] && exec "${{ray[@]}}" --head --port=6379 --include-dashboard=false
until "${{ray[@]}}" --address={head}:6379; do sleep 1; done'
"""
WAIT = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.2)
"""
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
TRAIN = ("train", f"{ROOT}/examples/countdown/fipo.yaml", *TINY, "evaluation.before_training=false")
NUMBERS = ("policy/loss", "policy/grad_norm", "reward/mean")


class RayOnNodes:
    """Ray on all nodes of a job, which runs with the cluster."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self.address = f"{cluster.address('node1')}:6379"
        script = cluster.folder / "ray.sbatch"
        script.write_text(RAY.format(python=sys.executable, head=cluster.address("node1")))
        nodes = len(cluster.names)
        self._job = cluster.submit(script, options=[f"--nodes={nodes}"], env=ENVIRONMENT)
        cluster.wait(self._job, "RUNNING", timeout=60)
        self.step([sys.executable, "-c", WAIT, self.address, str(nodes)])

    def step(self, words: list[str]) -> None:
        """Run a command on the first node, in the project's folder."""
        srun = ["srun", f"--jobid={self._job}", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=node1"]
        self.cluster.exec_on(LOGIN, [*srun, f"--chdir={ROOT}", *words], env=ENVIRONMENT, timeout=600)

    def actors(self) -> Counter[tuple[str, str]]:
        """How often each node has started which actor."""
        found: Counter[tuple[str, str]] = Counter()
        for node in self.cluster.names:
            for log in self.cluster.local_folder(node).glob("ray/session_2*/logs/worker-*.out"):
                name = log.read_text().partition(":actor_name:")[2].split("\n")[0]
                found[node, name] += 1
        return found


@pytest.fixture(scope="module")
def nodes(cluster_folder: Path) -> Iterator[RayOnNodes]:
    with SlurmCluster(cluster_folder, nodes=3, cpus=1) as cluster:
        yield RayOnNodes(cluster)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Metrics of the two iterations of a run on this machine."""
    folder = tmp_path_factory.mktemp("one-rank")
    run(*TRAIN, f"run_dir={folder}", "iterations=2")
    return iterations(folder)


def train(nodes: RayOnNodes, run_dir: Path, *overrides: str) -> None:
    """Train on the nodes. Each has run one rank or one engine."""
    before = nodes.actors()
    nodes.step(command(*TRAIN, f"run_dir={run_dir}", f"ray_address={nodes.address}", *overrides))
    started = [actor for actor in nodes.actors() - before if actor[1] in ("RankActor", "LocalEngine")]
    ranks = 2 if any("parallel." in override for override in overrides) else 1
    assert len({node for node, _ in started}) == len(started) == ranks + 1, started


def assert_equal(values: dict, expected: dict) -> None:
    assert {name: values[name] for name in NUMBERS} == pytest.approx(
        {name: expected[name] for name in NUMBERS}, rel=1e-4
    )


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], id="engine on another node"),
        pytest.param(["parallel.tensor_model_parallel_size=2"], id="tensor"),
        pytest.param(
            ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"], id="sequence"
        ),
        pytest.param(["parallel.context_parallel_size=2"], id="context"),
        pytest.param(["parallel.pipeline_model_parallel_size=2"], id="pipeline"),
    ],
)
def test_first_iteration(
    nodes: RayOnNodes, one_rank: list[dict], layout: list[str], request: pytest.FixtureRequest
) -> None:
    run_dir = nodes.cluster.folder / request.node.callspec.id.replace(" ", "-")
    train(nodes, run_dir, "iterations=1", *layout)
    assert_equal(iterations(run_dir)[0], one_rank[0])


def test_resume(nodes: RayOnNodes, one_rank: list[dict]) -> None:
    """Data-parallel ranks on two nodes write a checkpoint, and resume from it."""
    run_dir = nodes.cluster.folder / "data"
    for count in (1, 2):
        train(nodes, run_dir, f"iterations={count}", "parallel.data_parallel_size=2")
    for values, expected in zip(iterations(run_dir), one_rank, strict=True):
        assert_equal(values, expected)
