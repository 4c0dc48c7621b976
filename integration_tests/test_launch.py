"""The launch files of the documentation, as far as a machine without a cluster can run them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from launchers import LAUNCH, two_hosts, why_no_namespaces, with_commands
from torch.distributed.run import get_args_parser
from toy import make

TOY = Path(__file__).parent / "toy.py"
FAILING = Path(__file__).parent / "failing.py"
SHELL_FILES = ("multi_node.sh", "slurm.sbatch")
MANIFESTS = ("kubernetes.yaml", "pytorchjob.yaml")
TIMEOUT_S = 100


def losses_of_one_process(root: Path) -> list[float]:
    trainer, losses = make(root, "single", n_epochs=2)
    trainer.fit()
    return losses.losses


def finished(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Output of each process; kills them and their children afterwards."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def started(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


# Two hosts


@pytest.mark.parametrize(
    ("layout", "ranks_per_node"), [("fsdp", 1), pytest.param("hsdp", 2, marks=pytest.mark.full)]
)
def test_two_hosts_train_like_one_process(tmp_path: Path, layout: str, ranks_per_node: int) -> None:
    if (reason := why_no_namespaces()) is not None:
        pytest.skip(reason)
    env = {
        **with_commands(tmp_path / "bin"),
        "NUM_NODES": "2",
        "RANKS_PER_NODE": str(ranks_per_node),
    }
    script = str(LAUNCH / "multi_node.sh")
    train = ["bash", script, str(TOY), f"--layout={layout}", "--out=out.json"]
    with two_hosts() as hosts:
        head = next(iter(hosts.values()))
        finished(
            [
                started(
                    ["ip", "netns", "exec", host, *train],
                    # All namespaces have this host's name, whose address isn't in their network.
                    {
                        **env,
                        "HEAD": head,
                        "NODE": str(node),
                        "LOCAL_ADDR": address,
                        "GLOO_SOCKET_IFNAME": "cable",
                    },
                )
                for node, (host, address) in enumerate(hosts.items())
            ]
        )

    found = json.loads(Path("out.json").read_text())
    assert found["world_size"] == 2 * ranks_per_node
    assert found["losses"] == pytest.approx(losses_of_one_process(tmp_path), abs=1e-5)


@pytest.mark.full
def test_a_terminated_run_resumes_when_started_again(tmp_path: Path) -> None:
    env = {"HEAD": "localhost", "NUM_NODES": "1", "NODE": "0", "RANKS_PER_NODE": "2"}
    env = with_commands(tmp_path / "bin") | env | {"PORT": str(free_port())}
    train = ["bash", str(LAUNCH / "multi_node.sh"), str(FAILING), str(tmp_path), "--wait"]

    assert steps_at_begin(told_to_end(train, env)) == {0}
    (step,) = steps_at_begin(told_to_end(train, env))
    assert step > 0


def told_to_end(command: list[str], env: dict[str, str]) -> str:
    """Output of a run that gets SIGTERM, as from a scheduler, once all ranks train."""
    pids = [Path(f"pid-{rank}") for rank in (0, 1)]
    for pid in pids:
        pid.unlink(missing_ok=True)
    with started(command, env) as process:
        try:
            give_up_s = time.monotonic() + TIMEOUT_S
            while not all(pid.exists() for pid in pids) and time.monotonic() < give_up_s:
                time.sleep(0.1)
            time.sleep(1.0)
            process.terminate()
            output, _ = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return output


def steps_at_begin(output: str) -> set[int]:
    return {int(step) for step in re.findall(r"begins at step (\d+)", output)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
    return port


# Slurm

# As srun does: run the command once per node, with the node's number.
SRUN = """
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n && wait -n
"""
SCONTROL = 'test "$*" = "show hostnames here-[1-2]" && printf "localhost\\nlocalhost\\n"'
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "here-[1-2]"}


@pytest.mark.full
def test_the_slurm_script_trains_on_two_nodes(tmp_path: Path) -> None:
    env = with_commands(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL) | SLURM
    command = ["bash", str(LAUNCH / "slurm.sbatch"), str(TOY), "--out=out.json"]
    finished([started(command, {**env, "RANKS_PER_NODE": "1"})])

    found = json.loads(Path("out.json").read_text())
    assert found["world_size"] == 2
    assert found["losses"] == pytest.approx(losses_of_one_process(tmp_path), abs=1e-5)


def test_the_slurm_script_requests_what_torchrun_uses(tmp_path: Path) -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    env = with_commands(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL, torchrun=PRINT) | SLURM
    (output,) = finished([started(["bash", str(LAUNCH / "slurm.sbatch"), "train.py", "a b"], env)])
    first, second = sorted(map(parsed, output.splitlines()), key=lambda node: node.rdzv_conf)

    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("TERM@")
    for node in (first, second):
        assert node.nnodes == options["nodes"] == "2"
        assert node.nproc_per_node == "gpu"
        assert node.rdzv_endpoint == "localhost:24711"
        assert node.training_script_args == ["a b"]
    assert (second.rdzv_conf, first.rdzv_conf) == ("is_host=1", "is_host=0")


# The arguments of torchrun: one line per call, written at once.
WRITE = "import json, os, sys; os.write(1, json.dumps(sys.argv[1:]).encode() + bytes([10]))"
PRINT = f'exec "{sys.executable}" -c "{WRITE}" "$@"'


def parsed(line: str) -> Namespace:
    """Arguments printed by `PRINT`, parsed by torchrun's parser."""
    return get_args_parser().parse_args(json.loads(line))


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_files_have_no_syntax_errors(name: str) -> None:
    done = subprocess.run(
        ["bash", "-n", LAUNCH / name], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


# Kubernetes


def manifests(name: str) -> dict[str, Any]:
    """Documents of a file, by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((LAUNCH / name).read_text())}


def torchrun_of(container: dict[str, Any], env: dict[str, str], folder: Path) -> Namespace:
    """Arguments that a container's command gives torchrun, parsed by torchrun's parser."""
    own = {each["name"]: each["value"] for each in container["env"]}
    command = [*container["command"], *container["args"]]
    (output,) = finished([started(command, with_commands(folder, torchrun=PRINT) | own | env)])
    return parsed(output)


def test_pods_of_the_indexed_job_find_each_other(tmp_path: Path) -> None:
    found = manifests("kubernetes.yaml")
    service, job = found["Service"], found["Job"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    nodes = [
        torchrun_of(container, {"JOB_COMPLETION_INDEX": str(index)}, tmp_path)
        for index in range(job["spec"]["completions"])
    ]

    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == len(nodes)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    host = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    check_nodes(nodes, f"{host}:{container['ports'][0]['containerPort']}")
    check_pod(pod)


def test_pods_of_the_pytorchjob_find_each_other(tmp_path: Path) -> None:
    job = manifests("pytorchjob.yaml")["PyTorchJob"]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    pods = {name: replicas[name]["template"]["spec"] for name in ("Master", "Worker")}
    (container,) = pods["Master"]["containers"]
    # As the operator sets RANK: 0 for the master, then the workers.
    nodes = [torchrun_of(container, {"RANK": str(rank)}, tmp_path) for rank in (0, 1)]

    assert sum(replicas[name]["replicas"] for name in replicas) == len(nodes)
    assert pods["Worker"] == pods["Master"]
    assert (container["name"], container["ports"][0]["name"]) == ("pytorch", "pytorchjob-port")
    host = f"{job['metadata']['name']}-master-0"
    check_nodes(nodes, f"{host}:{container['ports'][0]['containerPort']}")
    check_pod(pods["Master"])


def check_nodes(nodes: list[Namespace], endpoint: str) -> None:
    assert [node.rdzv_conf for node in nodes] == ["is_host=1", "is_host=0"]
    for node in nodes:
        assert node.nnodes == str(len(nodes))
        assert node.rdzv_backend == "c10d"
        assert node.rdzv_endpoint == endpoint
        assert node.nproc_per_node == "gpu"
        assert node.max_restarts > 0


def check_pod(pod: dict[str, Any]) -> None:
    """Check that the grace period leaves time to save, and that mounted volumes exist."""
    (container,) = pod["containers"]
    env = {each["name"]: each["value"] for each in container["env"]}
    grace_s = int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert grace_s < pod["terminationGracePeriodSeconds"]
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}
    assert container["workingDir"] in {each["mountPath"] for each in container["volumeMounts"]}


def test_all_launch_files_are_tested() -> None:
    assert {file.name for file in LAUNCH.iterdir()} == {*SHELL_FILES, *MANIFESTS}
