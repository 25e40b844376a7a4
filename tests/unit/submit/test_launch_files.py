"""The files of launch/: their syntax, their schemas, and their shell logic with stand-ins for Slurm, SkyPilot
and Ray."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.cluster.submit.schedulers import Launch, artefact

REPOSITORY = Path(__file__).resolve().parents[3]
LAUNCH = REPOSITORY / "launch"
SHELL = ("local.sh", "ray_cluster.sh", "slurm.sbatch")
SCHEMA = json.loads((Path(__file__).parent / "rayjob-v1.schema.json").read_text())
FILLED = Launch(
    "tiny/dpo", ("a.b=c d",), "one", 3, 8, 96, "/shared/runs/one", "registry.example/orchestrator:0.1.0"
)

# The part of SkyPilot's task schema (sky/utils/schemas.py) that is in use; unknown keys are refused.
SKY: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$"},
        "num_nodes": {"type": "integer"},
        "setup": {"type": "string"},
        "run": {"type": "string"},
        "volumes": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "propertyNames": {"pattern": "^/"},
        },
        "secrets": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "cpus": {"type": ["string", "number"]},
                "memory": {"type": ["string", "number"]},
                "accelerators": {"type": "string"},
                "image_id": {"type": "string"},
                "use_spot": {"type": "boolean"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"type": ["string", "null"]},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                            "uniqueItems": True,
                        },
                    },
                },
            },
        },
    },
}


def texts(target: str) -> list[str]:
    """The template as it is, and filled in."""
    files = {"slurm": "slurm.sbatch", "k8s": "kuberay.yaml", "sky": "skypilot.yaml"}
    return [(LAUNCH / files[target]).read_text(), artefact(target, FILLED)]


def train_script(text: str) -> str:
    """The script of the head of a RayJob."""
    return next(iter(yaml.safe_load_all(text)))["data"]["train.sh"]


def scripts() -> list[str]:
    """All shell scripts of launch/."""
    return [
        *((LAUNCH / name).read_text() for name in SHELL),
        texts("slurm")[1],
        *map(train_script, texts("k8s")),
        *(yaml.safe_load(text)["run"] for text in texts("sky")),
    ]


@pytest.mark.parametrize("number", range(len(scripts())))
def test_shell_is_well_formed(number: int) -> None:
    script = scripts()[number]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    checked = subprocess.run(
        ["shellcheck", "--shell=bash", "--exclude=SC2317", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_no_launcher_knows_a_hyper_parameter() -> None:
    keys = re.compile(
        r"\b(algorithm|optimizer|batch|rollouts|learners|data|model|evaluation|checkpoint)\.[a-z_]+="
        r"|learning_rate|micro_batch|max_steps"
    )
    for path in [*LAUNCH.iterdir(), *(REPOSITORY / "docker").iterdir()]:
        assert keys.search(path.read_text()) is None, path.name


# Slurm


def directives(text: str) -> dict[str, str]:
    """The #SBATCH lines before the first command, which are all that sbatch reads."""
    values: dict[str, str] = {}
    for line in text.split("\n"):
        if line.startswith("#SBATCH "):
            name, _, value = line.partition("  #")[0].removeprefix("#SBATCH --").partition("=")
            values[name] = value
        elif line and not line.startswith("#"):
            return values
    raise AssertionError("no command")


def test_slurm_warns_before_the_end_and_queues_the_job_again() -> None:
    for text in texts("slurm"):
        found = directives(text)
        assert found["signal"] == "B:USR1@300" and found["open-mode"] == "append"
        assert "requeue" in found and "exclusive" in found and found["ntasks-per-node"] == "1"
        assert text.count("#SBATCH --") == len(found), "a directive after the first command is ignored"


TRAIN = """#!/bin/bash
# python -m orchestrator train …: waits for the file `end`, or for SIGTERM
printf '%s\\n' "$@" >"$STAND/arguments"
stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$STAND/mode"; cp "$RAY_AUTH_TOKEN_PATH" "$STAND/token"
echo "$RAY_ADDRESS $RAY_AUTH_MODE" >"$STAND/joined"
trap 'exit 75' TERM
touch "$STAND/training"
while [[ ! -e $STAND/end ]]; do sleep 0.05; done
exit "$(<"$STAND/end")"
"""
STAND_INS = {
    "python": TRAIN,
    # runs the command of the first node, as all nodes do
    "srun": '#!/bin/bash\nprintf \'%s\\n\' "$@" >"$STAND/srun"\nwhile [[ $1 == --* ]]; do shift; '
    'done\nSLURM_NODEID=0 exec "$@"\n',
    "ray": '#!/bin/bash\nif [[ $1 == stop ]]; then touch "$STAND/stopped"; exit; fi\nwhile [[ $1 != -- ]]; '
    'do shift; done\nshift\n"$@"\n',
    "scontrol": '#!/bin/bash\nif [[ $1 == requeue ]]; then echo "$2" >"$STAND/requeued"; else echo node1; '
    "fi\n",
    "squeue": '#!/bin/bash\necho "${STATE:-RUNNING}"\n',
}


@dataclass(frozen=True, slots=True)
class Job:
    """A running slurm.sbatch."""

    process: subprocess.Popen[str]
    folder: Path
    """Folder of the stand-ins and of the files that they write."""

    def end(self, code: int) -> None:
        (self.folder / "end").write_text(str(code))

    def code(self) -> int:
        """The script's exit code; its output goes to the test's."""
        out, _ = self.process.communicate(timeout=20)
        print(out)
        return self.process.returncode

    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline and self.process.poll() is None, f"{name} never came"
            time.sleep(0.02)


class Slurm:
    """Starts slurm.sbatch as Slurm does, with stand-ins for Slurm's and Ray's commands and for the
    training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, list[Job]()
        for name, body in STAND_INS.items():
            (folder / name).write_text(body)
            (folder / name).chmod(0o755)

    def start(self, **variables: str) -> Job:
        text = artefact(
            "slurm", Launch("tiny/dpo", ("x=a 'b'",), "one", 1, 0, 2, str(self.folder / "runs" / "one"), "")
        )
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_JOB_NUM_NODES": "1",
            "HEAD_IP": "10.0.0.1",
        }
        own = {"PATH": f"{self.folder}:/usr/bin:/bin", "STAND": str(self.folder)}
        (self.folder / "script").write_text(text)
        process = subprocess.Popen(
            ["bash", str(self.folder / "script")],
            env={**slurm, **own, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.jobs.append(Job(process, self.folder))
        return self.jobs[-1]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    started = Slurm(tmp_path)
    yield started
    for job in started.jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@pytest.mark.parametrize(("code", "again"), [(0, False), (70, False), (75, True), (78, False)])
def test_the_job_ends_with_the_runs_exit_code_and_only_75_queues_it_again(
    slurm: Slurm, code: int, again: bool
) -> None:
    job = slurm.start()
    job.end(code)
    assert job.code() == code and job.requeued() == again
    assert (slurm.folder / "stopped").exists(), "Ray's daemons must be stopped"
    assert (slurm.folder / "arguments").read_text().split("\n")[:-1] == [
        *("-m", "orchestrator", "train", "tiny/dpo", "x=a 'b'"),
        *("--output", str(slurm.folder / "runs" / "one")),
    ]


def test_usr1_reaches_the_training_as_sigterm_and_the_job_is_queued_again(slurm: Slurm) -> None:
    job = slurm.start()
    job.wait_for("training")
    job.process.send_signal(signal.SIGUSR1)
    assert job.code() == 75 and (slurm.folder / "requeued").read_text() == "7\n"


def test_a_cancelled_job_is_not_queued_again(slurm: Slurm) -> None:
    job = slurm.start(STATE="COMPLETING")
    job.wait_for("training")
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75 and not job.requeued()


def test_a_job_is_not_queued_again_for_ever(slurm: Slurm) -> None:
    job = slurm.start(SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    job.end(75)
    assert job.code() == 75 and not job.requeued()


def test_only_the_owner_can_read_the_token_and_it_is_removed_afterwards(slurm: Slurm) -> None:
    job = slurm.start()
    job.end(0)
    assert job.code() == 0
    token = (slurm.folder / "token").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", token) and (slurm.folder / "mode").read_text() == "600\n"
    assert (slurm.folder / "joined").read_text() == "10.0.0.1:6379 token\n"
    assert token not in (slurm.folder / "srun").read_text() + (slurm.folder / "arguments").read_text()
    assert not list((slurm.folder / "runs").glob(".slurm-*"))


# Kubernetes


def rayjob(text: str) -> dict[str, Any]:
    (job,) = [document for document in yaml.safe_load_all(text) if document["kind"] == "RayJob"]
    return job


def pods(text: str) -> list[dict[str, Any]]:
    """The pod specs of head, workers and submitter."""
    spec = rayjob(text)["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    return [*(group["template"]["spec"] for group in groups), spec["submitterPodTemplate"]["spec"]]


@pytest.mark.parametrize("text", texts("k8s"), ids=["template", "filled"])
def test_the_rayjob_meets_kuberays_schema(text: str) -> None:
    job = rayjob(text)
    assert job["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(SCHEMA).validate(job)


def test_the_schema_rejects_a_mistake() -> None:
    job = rayjob(texts("k8s")[0])
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["securityContxt"] = {}
    with pytest.raises(jsonschema.ValidationError, match="securityContxt"):
        jsonschema.Draft202012Validator(SCHEMA).validate(job)


@pytest.mark.parametrize("text", texts("k8s"), ids=["template", "filled"])
def test_the_rayjob_asks_for_a_token_tries_again_and_cleans_up(text: str) -> None:
    spec = rayjob(text)["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["submissionMode"] == "K8sJobMode" and spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert f"\nray=={spec['rayClusterSpec']['rayVersion']}\n" in (REPOSITORY / "constraints.txt").read_text()


@pytest.mark.parametrize("text", texts("k8s"), ids=["template", "filled"])
def test_every_pod_is_unprivileged_and_takes_secrets_from_a_secret(text: str) -> None:
    assert len(pods(text)) == 3
    for pod in pods(text):
        context = pod["securityContext"]
        assert (
            context["runAsNonRoot"] is True
            and context["runAsUser"] == 1000
            and context["seccompProfile"] == {"type": "RuntimeDefault"}
        )
        assert pod["automountServiceAccountToken"] is False
        mounted = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounted
            assert not container["image"].endswith(":latest") and ":" in container["image"]
            for variable in container["env"]:
                assert "KEY" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]
    claims = [
        volume["persistentVolumeClaim"]
        for pod in pods(text)[:2]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == [{"claimName": "runs"}] * 2


def test_compiled_kernels_outlive_a_pod() -> None:
    for pod in pods(texts("k8s")[0])[:2]:
        (container,) = pod["containers"]
        claimed = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "runs"]
        kept = {v["name"]: v["value"] for v in container["env"] if "CACHE" in v["name"]}
        assert set(kept) == {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT"}
        assert all(folder.startswith(f"{claimed[0]}/") for folder in kept.values())


def test_the_entry_point_survives_a_shell_as_it_is() -> None:
    """KubeRay puts it into a shell command, and `ray job submit` into another one."""
    for text in texts("k8s"):
        assert re.fullmatch(r"[a-z /.]+", rayjob(text)["spec"]["entrypoint"])


@pytest.mark.parametrize(
    ("codes", "code"), [("0", 0), ("75 75 0", 0), ("75 70", 70), ("78", 78), ("75 " * 60, 75)]
)
def test_the_run_is_started_again_while_it_ends_with_75(tmp_path: Path, codes: str, code: int) -> None:
    for number, end in enumerate(codes.split()):
        (tmp_path / f"{number}").write_text(end)
    (tmp_path / "python").write_text(
        '#!/bin/bash\ncd "$STAND"; echo >>calls; exit "$(<"$(($(wc -l <calls) - 1))")"\n'
    )
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STAND": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", train_script(texts("k8s")[1])], env=environment, timeout=20, check=False
    )
    assert done.returncode == code and len((tmp_path / "calls").read_text().split("\n")) - 1 == min(
        len(codes.split()), 50
    )


def test_a_ray_job_that_is_stopped_stays_stopped(slurm: Slurm) -> None:
    """With the same stand-in of the training; the whole process group gets the signal, as from Ray."""
    (slurm.folder / "script").write_text(train_script(texts("k8s")[1]))
    environment = {
        "PATH": f"{slurm.folder}:/usr/bin:/bin",
        "STAND": str(slurm.folder),
        "RAY_AUTH_TOKEN_PATH": "/dev/null",
    }
    process = subprocess.Popen(
        ["bash", str(slurm.folder / "script")],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    job = Job(process, slurm.folder)
    slurm.jobs.append(job)
    job.wait_for("training")
    os.killpg(process.pid, signal.SIGTERM)
    assert job.code() == 75


# SkyPilot


@pytest.mark.parametrize("text", texts("sky"), ids=["template", "filled"])
def test_the_task_meets_skypilots_schema(text: str) -> None:
    task = yaml.safe_load(text)
    jsonschema.Draft202012Validator(SKY).validate(task)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [
        75
    ]  # 137 would start again what was killed for its memory
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None, "WANDB_API_KEY": ""}


SKY_RAY = """#!/bin/bash
case "$1 $2" in
"start --head")
    trap 'touch "$STAND/ended"; exit 0' TERM
    echo "$RAY_AUTH_MODE" >"$STAND/head"
    while :; do sleep 0.05; done ;;
"start "*) echo "$2" >"$STAND/worker"; exit 1 ;;
esac
"""


def test_the_head_ends_its_own_ray_and_the_task_with_the_runs_exit_code(tmp_path: Path) -> None:
    up = "until [[ -e $STAND/head ]]; do sleep 0.05; done"  # as the real one waits for the head
    waiting = (
        f"#!/bin/bash\nif [[ $1 == - ]]; then cat >/dev/null; {up}; exit 0; fi\n[[ "
        "${WANDB_API_KEY-unset} == unset ]] || exit 1\nexit 75\n"
    )
    for name, body in {"ray": SKY_RAY, "python": waiting}.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    sky = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "RAY_AUTH_TOKEN": "t",
        "WANDB_API_KEY": "",
    }
    own = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STAND": str(tmp_path)}
    run = yaml.safe_load(texts("sky")[1])["run"]
    for rank, code in (("0", 75), ("1", 0)):  # a worker's Ray that ends with the head's is no failure
        done = subprocess.run(
            ["bash", "-c", run],
            env={**sky, **own, "SKYPILOT_NODE_RANK": rank},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "head").read_text() == "token\n" and (tmp_path / "ended").exists()
    assert (tmp_path / "worker").read_text() == "--address=10.0.0.1:6379\n"


# One machine, and machines by ssh: test_real_clusters.py runs them


@pytest.mark.parametrize("name", ["local.sh", "ray_cluster.sh"])
def test_called_wrongly_it_prints_its_usage_and_starts_nothing(name: str, tmp_path: Path) -> None:
    path = LAUNCH / name
    assert path.stat().st_mode & stat.S_IXUSR
    done = subprocess.run(
        [str(path)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64 and f"launch/{name}" in done.stderr and "RAY_PORT" in done.stderr


def test_a_host_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "hosts"
    empty.write_text("# nobody\n\n")
    for file, code in ((tmp_path / "nowhere", 66), (empty, 65)):
        done = subprocess.run(
            [str(LAUNCH / "ray_cluster.sh"), "up", str(file)], capture_output=True, text=True, check=False
        )
        assert done.returncode == code and str(file) in done.stderr
