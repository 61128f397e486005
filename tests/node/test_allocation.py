import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.node.preflight.allocation import Allocation, expand_nodes, from_options, from_slurm

STEP = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "gpu[01-09]",
    "SLURM_STEP_NODELIST": "gpu[02-03,07]",
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1 node2 node3"),
        ("gpu[08-10,12],login", "gpu08 gpu09 gpu10 gpu12 login"),
        ("a,b[1,3]-ib,c", "a b1-ib b3-ib c"),
        ("rack[1-2]node[01-02]", "rack1node01 rack1node02 rack2node01 rack2node02"),
    ],
)
def test_node_lists(text: str, names: str) -> None:
    assert expand_nodes(text) == tuple(names.split())


@given(st.integers(0, 200), st.integers(0, 50), st.integers(1, 4))
def test_a_range_has_all_its_numbers_with_their_zeros(first: int, count: int, width: int) -> None:
    names = [f"n{number:0{width}}" for number in range(first, first + count + 1)]
    assert list(expand_nodes(f"n[{names[0][1:]}-{names[-1][1:]}]")) == names


@pytest.mark.parametrize(
    "text",
    ["node[1-x]", "node[]", "a[1-", "a[3-1]", "a[-]", "[1-2]]", "a,,b", "a]", "a[1-200000000]", "a[²]"],
)
def test_an_unknown_notation_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"cannot be read .*; name the nodes"):
        expand_nodes(text)


def test_the_nodes_of_a_step() -> None:
    found = from_slurm(STEP)
    assert found == Allocation(("gpu02", "gpu03", "gpu07"), 1, "gpu02", 20_000 + 1234567 % 8000)
    assert found.name == "gpu03"


def test_head_and_port_can_be_chosen() -> None:
    assert from_slurm(STEP, "10.0.0.1:5").address == "10.0.0.1"
    assert from_slurm(STEP, "10.0.0.1:5").port == 5
    assert from_slurm(STEP, "ib02").port == from_slurm(STEP).port


def test_outside_slurm_this_machine_is_checked_alone() -> None:
    found = from_slurm({})
    assert (len(found.names), found.rank, found.port) == (1, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: from_slurm({**STEP, "SLURM_NTASKS": "24"}),
            "24 tasks on 3 nodes; use srun --ntasks-per-node=1",
        ),
        (lambda: from_options(["a", "b"], 2, None), "--rank 2 must be between 0 and 1"),
        (lambda: from_options(["a", "a"], 0, None), "node a is named twice"),
        (lambda: from_options(["a", ""], 0, None), "'' is not the name of a node"),
        (lambda: from_options(["a", " b"], 0, None), "' b' is not the name of a node"),
        (lambda: from_options(["a", "b"], 0, "a:²"), "--head 'a:²' must be HOST or HOST:PORT"),
        (lambda: from_options(["a", "b"], 0, "a:65536"), "with a port up to 65535"),
        (lambda: from_options(["a", "b"], 0, "a:" + "9" * 5000), "with a port up to 65535"),
        (lambda: from_options(["a", "b"], 0, ":5"), "--head ':5' must be HOST"),
        (lambda: from_options(["a", "b"], 0, "a:0"), "port 0, which only a single node can use"),
        (lambda: from_slurm({**STEP, "SLURM_PROCID": "3"}), "SLURM_PROCID=3 is none of 3 tasks"),
        (lambda: from_slurm({**STEP, "SLURM_PROCID": "-1"}), "SLURM_PROCID='-1' is not a whole number"),
        (lambda: from_slurm({**STEP, "SLURM_NTASKS": "z"}), "SLURM_NTASKS='z' is not a whole number"),
        (lambda: from_slurm({**STEP, "SLURM_JOB_ID": ""}), "SLURM_JOB_ID is not set"),
        (lambda: from_slurm({"SLURM_PROCID": "0"}), "SLURM_JOB_NODELIST is not set"),
        (lambda: from_options(["a", "b"], 0, "a:x"), "--head 'a:x' must be HOST or HOST:PORT"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
