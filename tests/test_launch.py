"""Launchers: the script that sbatch gets, what Slurm's answers mean, and how often it is asked."""

import os
import re
import stat
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from hptool import files, launch
from hptool.errors import BusyError, LaunchError
from hptool.facts import Cluster, SlurmOptions
from hptool.launch import JobState, Run, SlurmLauncher, slurm_commands, slurm_queue
from hptool.measurement import FailureKind


def run(directory: Path, nodes: int = 2, token: str = "") -> Run:
    return Run(name="tp2", directory=directory, nodes=nodes, max_minutes=7.5, token=token)


def with_options(cluster: Cluster, **changes: object) -> Cluster:
    return replace(cluster, slurm=replace(cluster.slurm, **changes))  # type: ignore[arg-type]


def test_the_script_for_a_dgx(dgx_a100: Cluster, snapshot: SnapshotAssertion) -> None:
    site = with_options(dgx_a100, python="python")
    parameters = launch.run_parameters(run(Path("results/demo/runs/tp2")), site)
    assert launch.batch_script(parameters, Path("/shared/tp2.yaml"), Path("/shared/tp2")) == snapshot


WISHES = SlurmOptions(
    partition="batch; touch pwned",
    account="lab",
    qos="high",
    constraint="ib&nvme",
    gpu_request="gres",
    gpu_type="a100",
    mem_gib_per_node=1000,
    container_image="/images/nemo 25.sqsh; touch pwned",
    container_mounts=("/shared:/shared", "/data/$(touch pwned):/data:ro"),
    container_workdir="/`touch pwned`",
    python="env 'A=$(touch pwned)' /opt/venv/bin/python",
    modules=("nccl/2.21", "cuda; touch pwned"),
    setup=("source /etc/profile.d/modules.sh || true",),
    prolog=("nvidia-smi || true",),
    epilog=("true 'the end'",),
    signal="TERM@60",
    requeue=True,
    extra_options={"reservation": "maint $(touch pwned)", "comment": "`touch pwned`; touch pwned"},
)


def test_the_script_for_a_site_with_wishes(dgx_a100: Cluster, snapshot: SnapshotAssertion) -> None:
    site = replace(dgx_a100, slurm=WISHES, environment={"NCCL_DEBUG": "it's; $(x)", "WANDB_API_KEY": "hush-hush"})
    parameters = launch.run_parameters(run(Path("it's here/runs/tp2")), site)
    assert launch.batch_script(parameters, Path("/a b.yaml"), Path("/a b")) == snapshot


def test_nothing_that_a_user_gives_reaches_a_shell_unquoted(dgx_a100: Cluster, tmp_path: Path) -> None:
    site = replace(dgx_a100, slurm=WISHES, environment={"X": "$(touch pwned)"})
    parameters = launch.run_parameters(run(tmp_path / "$(touch pwned)" / "runs" / "tp2"), site)
    script = launch.batch_script(parameters, tmp_path / "$(touch pwned)", tmp_path / "`touch pwned`")
    harmless = f"module() {{ :; }}\n{script.replace('srun ', 'true srun ')}"
    subprocess.run(["bash", "-c", harmless], cwd=tmp_path, check=True)
    assert not (tmp_path / "pwned").exists()


def test_a_job_script_names_what_it_calls_itself(dgx_a100: Cluster, snapshot: SnapshotAssertion) -> None:
    site = with_options(dgx_a100, python="python", extra_options={"comment": "project 7"})
    parameters = launch.run_parameters(run(Path("results/demo/runs/tp2")), site)
    words = {"name": "t0", "count": 2, "comment": "hptool:t0,t1"}
    assert launch.slurm_script.job_script(parameters, Path("/shared/it's"), **words) == snapshot  # type: ignore[arg-type]


def test_an_epilog_keeps_the_exit_code(dgx_a100: Cluster, tmp_path: Path) -> None:
    site = with_options(dgx_a100, epilog=("touch cleaned",))
    script = launch.batch_script(launch.run_parameters(run(tmp_path), site), tmp_path, tmp_path)
    failing = script.replace("srun ", "fails() { return 7; }; fails ")
    assert subprocess.run(["bash", "-c", failing], cwd=tmp_path, check=False).returncode == 7
    assert (tmp_path / "cleaned").exists()


def test_a_job_without_its_modules_ends_at_once(dgx_a100: Cluster, tmp_path: Path) -> None:
    site = with_options(dgx_a100, modules=("nccl",))
    script = launch.batch_script(launch.run_parameters(run(tmp_path), site), tmp_path, tmp_path)
    without = f"module() {{ return 1; }}\n{script.replace('srun ', 'touch started; true ')}"
    assert subprocess.run(["bash", "-c", without], cwd=tmp_path, check=False).returncode == 1
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, ["--gpus-per-node=8"]),
        ({"gpu_type": "a100"}, ["--gpus-per-node=a100:8"]),
        ({"gpu_request": "gres"}, ["--gres=gpu:8"]),
        ({"gpu_request": "none"}, []),
        ({"gpu_request": "none", "extra_options": {"gres": "gpu:sxm:8,nvme:1"}}, ["--gres=gpu:sxm:8,nvme:1"]),
        ({"extra_options": {"gpus-per-node": "h100:4"}}, ["--gpus-per-node=h100:4"]),
    ],
)
def test_how_gpus_are_asked_for(changes: dict[str, object], lines: list[str], dgx_a100: Cluster) -> None:
    parameters = launch.run_parameters(run(Path("a/b/c")), with_options(dgx_a100, **changes))
    script = launch.batch_script(parameters, Path("/c"), Path("/o"))
    assert re.findall(r"^#SBATCH (--g\S*)$", script, re.MULTILINE) == lines


def test_options_that_are_off_or_asked_for_twice(dgx_a100: Cluster) -> None:
    extra = {"requeue": True, "overcommit": False, "signal": "USR1@30", "cpus-per-task": 4}
    parameters = launch.run_parameters(run(Path("a/b/c")), with_options(dgx_a100, extra_options=extra))
    script = launch.batch_script(parameters, Path("/c"), Path("/o"))
    asked = re.findall(r"^#SBATCH --(.*requeue|overcommit.*|signal=.*|cpus-per-task=.*)$", script, re.MULTILINE)
    assert sorted(asked) == ["cpus-per-task=4", "requeue", "signal=USR1@30"]


class FakeSlurm:
    """Slurm's commands as scripts that note their calls and print what a test wrote for them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("squeue", "sacct", "scancel", "sbatch", "srun"):
            script = directory / name
            script.write_text(
                f'#!/bin/sh\necho "{name} $*" >> {directory}/calls\nenv > {directory}/{name}.env\n'
                f"cat {directory}/{name}.err >&2 2>/dev/null; cat {directory}/{name}.out 2>/dev/null\n"
                f"sleep $(cat {directory}/{name}.pause 2>/dev/null || echo 0)\n"
                f"test ! -e {directory}/{name}.err\n"
            )
            script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def says(self, name: str, *, out: str = "", err: str | None = None, pause_s: float = 0) -> None:
        (self.directory / f"{name}.out").write_text(out)
        (self.directory / f"{name}.err").unlink(missing_ok=True)
        (self.directory / f"{name}.pause").write_text(str(pause_s))
        if err is not None:
            (self.directory / f"{name}.err").write_text(err)

    def environment(self, name: str) -> dict[str, str]:
        """What the last call of this command had in its environment."""
        lines = (self.directory / f"{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return FakeSlurm(tmp_path)


@dataclass
class Clock:
    """Stands still until a test moves it."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def launcher(dgx_a100: Cluster, tmp_path: Path) -> SlurmLauncher:
    return SlurmLauncher(dgx_a100, tmp_path / "jobs", arrays=True)


@pytest.mark.parametrize(
    ("line", "state", "meaning"),
    [
        ("PENDING|Resources", JobState.PENDING, FailureKind.CRASH),
        ("PENDING|PartitionTimeLimit", JobState.LOST, FailureKind.REJECTED),
        ("RUNNING|None", JobState.RUNNING, FailureKind.CRASH),
        ("SUSPENDED|None", JobState.RUNNING, FailureKind.CRASH),
        ("COMPLETING|None", JobState.RUNNING, FailureKind.CRASH),
        ("COMPLETED|None", JobState.ENDED, FailureKind.CRASH),
        ("FAILED|NonZeroExitCode", JobState.ENDED, FailureKind.CRASH),
        ("OUT_OF_MEMORY|OutOfMemory", JobState.ENDED, FailureKind.OOM),
        ("TIMEOUT|TimeLimit", JobState.ENDED, FailureKind.TIMEOUT),
        ("CANCELLED|None", JobState.ENDED, FailureKind.LOST),
        ("PREEMPTED|None", JobState.ENDED, FailureKind.LOST),  # submitted with --no-requeue, so it is over
        ("NODE_FAIL|NodeDown", JobState.ENDED, FailureKind.LOST),
    ],
)
def test_what_the_queue_says(
    line: str, state: JobState, meaning: FailureKind, slurm: FakeSlurm, launcher: SlurmLauncher
) -> None:
    slurm.says("squeue", out=f"12_0|{line}\n13|RUNNING|None\n")
    found = launcher.status(["12_0"])["12_0"]
    assert (found.state, found.meaning) == (state, meaning)


def test_a_job_that_the_queue_forgot_is_looked_up_in_the_accounting(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("sacct", out="12|CANCELLED by 1000\n")
    found = launcher.status(["12"])["12"]
    assert (found.state, found.meaning) == (JobState.ENDED, FailureKind.LOST)
    assert "CANCELLED by 1000" in found.detail


@pytest.mark.parametrize(
    "sacct", [{"err": "Slurm accounting storage is disabled"}, {"out": ""}, {"out": "12|RUNNING\n"}]
)
def test_a_job_that_nobody_knows_is_lost_within_seconds(
    sacct: dict[str, str], slurm: FakeSlurm, launcher: SlurmLauncher, clock: Clock
) -> None:
    slurm.says("sacct", **sacct)  # type: ignore[arg-type]
    assert launcher.status(["12"])["12"].state is JobState.RUNNING  # it may only just have been submitted
    clock.now += slurm_queue.UNKNOWN_PATIENCE_S + 1
    found = launcher.status(["12"])["12"]
    assert (found.state, found.meaning, found.may_run_again) == (JobState.LOST, FailureKind.LOST, True)


def test_disabled_accounting_is_asked_once(slurm: FakeSlurm, launcher: SlurmLauncher, clock: Clock) -> None:
    slurm.says("sacct", err="Slurm accounting storage is disabled")
    for _ in range(3):
        launcher.status(["12"])
        clock.now += 11
    assert sum(call.startswith("sacct") for call in slurm.calls()) == 1


def test_a_controller_that_is_away_judges_nobody(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    found = launcher.status(["12"])["12"]
    assert found.state is JobState.PENDING
    assert "Unable to contact slurm controller" in found.detail


def test_a_final_state_never_changes(slurm: FakeSlurm, launcher: SlurmLauncher, clock: Clock) -> None:
    slurm.says("squeue", out="12|COMPLETED|None\n")
    launcher.status(["12"])
    slurm.says("squeue", out="12|RUNNING|None\n")
    clock.now += 11
    assert launcher.status(["12"])["12"].state is JobState.ENDED


def test_an_absent_controller_changes_no_state(slurm: FakeSlurm, launcher: SlurmLauncher, clock: Clock) -> None:
    slurm.says("squeue", out="12|RUNNING|None\n")
    launcher.status(["12"])
    slurm.says("squeue", err="slurm_load_jobs error: Socket timed out on send/recv operation")
    clock.now += 1000
    found = launcher.status(["12"])["12"]
    assert found.state is JobState.RUNNING
    assert "Socket timed out" in found.detail


def test_a_job_that_slurm_queues_again_is_pending_again(
    slurm: FakeSlurm, launcher: SlurmLauncher, clock: Clock
) -> None:
    states = []
    for line in ("RUNNING|None", "PENDING|BeginTime", "RUNNING|None", "REQUEUED|None", "COMPLETED|None"):
        slurm.says("squeue", out=f"12|{line}\n")
        states.append(launcher.status(["12"])["12"].state.value)
        clock.now += 11
    assert states == ["running", "pending", "running", "pending", "ended"]


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REVOKED"])
def test_what_slurm_takes_away_is_over_unless_it_queues_it_again(
    state: str, slurm: FakeSlurm, dgx_a100: Cluster, tmp_path: Path, clock: Clock
) -> None:
    slurm.says("sacct", out=f"12|{state}\n")
    launcher = SlurmLauncher(with_options(dgx_a100, requeue=True), tmp_path, arrays=True)
    assert launcher.status(["12"])["12"].state is JobState.RUNNING  # it may be pending in a moment
    slurm.says("squeue", out="12|PENDING|BeginTime\n")
    clock.now += 11
    assert launcher.status(["12"])["12"].state is JobState.PENDING
    slurm.says("squeue", out=f"12|{state}|None\n")
    for _ in range(2):
        clock.now += 11
        launcher.status(["12"])
    found = launcher.status(["12"])["12"]
    assert (found.state, found.meaning, found.may_run_again) == (JobState.ENDED, FailureKind.LOST, True)


def test_who_cancelled_a_job_is_told(slurm: FakeSlurm, launcher: SlurmLauncher, clock: Clock) -> None:
    slurm.says("squeue", out="12|CANCELLED|None\n13|CANCELLED|None\n")
    launcher.cancel(["13"])
    clock.now += 11
    found = launcher.status(["12", "13"])
    assert found["12"].detail == "someone cancelled job 12: CANCELLED"
    assert found["13"].detail == "hptool cancelled job 13: CANCELLED"
    assert not found["12"].may_run_again


def test_a_job_that_slurm_could_not_start_and_holds_is_given_up(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", out="12|PENDING|launch failed requeued held\n")
    found = launcher.status(["12"])["12"]
    assert (found.state, found.may_run_again) == (JobState.LOST, True)
    assert "scancel 12" in slurm.calls()


def test_one_question_answers_for_all_jobs_and_for_a_while(
    slurm: FakeSlurm, launcher: SlurmLauncher, clock: Clock
) -> None:
    slurm.says("squeue", out="".join(f"12_{i}|RUNNING|None\n" for i in range(400)))
    slurm.says("sacct", out="".join(f"12_{i}|COMPLETED\n" for i in range(400, 450)))
    jobs = [f"12_{i}" for i in range(500)]
    for _ in range(50):
        launcher.status(jobs)
        clock.now += launcher.poll_s
    states = launcher.status(jobs)
    assert sum(call.startswith("squeue") for call in slurm.calls()) <= 11
    assert sum(call.startswith("sacct") for call in slurm.calls()) <= 11
    assert [states[f"12_{i}"].state.value for i in (0, 400, 450)] == ["running", "ended", "lost"]


def test_jobs_submitted_since_slurm_was_asked_are_pending(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", out="12|RUNNING|None\n")
    launcher.status(["12"])
    assert launcher.status(["12", "13"])["13"].state is JobState.PENDING
    assert len(slurm.calls()) == 1


def test_a_profile_may_ask_more_often(dgx_a100: Cluster, tmp_path: Path, launcher: SlurmLauncher) -> None:
    assert launcher.poll_s == 2
    assert SlurmLauncher(with_options(dgx_a100, poll_s=0.5), tmp_path, arrays=True).poll_s == 0.5


@pytest.mark.parametrize("command", ["squeue", "scancel", "sbatch", "sacct"])
def test_no_command_may_take_for_ever(command: str, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_commands, "TIME_LIMIT_S", 0.2)
    slurm.says(command, out="12\n", err="sbatch: Slurm temporarily unable to accept job, sleeping", pause_s=1000)
    answer = slurm_commands.slurm(command)
    assert answer.returncode == slurm_commands.TIMED_OUT
    assert answer.stderr.endswith(f"\n{command} gave no answer in 0.2 s")
    assert isinstance(slurm_commands.refusal(answer, {}), BusyError)


def test_habits_of_a_user_change_no_answer(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SCANCEL_INTERACTIVE", "1")
    slurm_commands.slurm("squeue")
    assert not {"SQUEUE_PARTITION", "SCANCEL_INTERACTIVE"} & slurm.environment("squeue").keys()


# ---------------------------------------------------------------- submitting


def submitted(launcher: SlurmLauncher, *runs: Run) -> dict[str, str]:
    """Job ids by token of what was started; a BusyError leaves what was started before it."""
    found: dict[str, str] = {}
    launcher.submit(runs, lambda run, job_id: found.update({run.token: job_id}))
    return found


def test_runs_of_a_shape_are_one_array_that_names_them_all(
    slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path
) -> None:
    slurm.says("sbatch", out="12;cluster\n")
    runs = [run(tmp_path, token=f"t{i}") for i in range(3)]
    assert submitted(launcher, *runs) == {"t0": "12_0", "t1": "12_1", "t2": "12_2"}
    script = (tmp_path / "jobs" / "t0.sh").read_text()
    assert "#SBATCH --comment=hptool:t0,t1,t2\n#" in script
    assert "#SBATCH --array=0-2%3\n" in script
    assert len(list((tmp_path / "jobs").glob("t0_*.pkl"))) == 3


def test_without_arrays_every_run_is_a_job(slurm: FakeSlurm, dgx_a100: Cluster, tmp_path: Path) -> None:
    slurm.says("sbatch", out="12\n")
    launcher = SlurmLauncher(dgx_a100, tmp_path / "jobs", arrays=False)
    assert submitted(launcher, *(run(tmp_path, token=f"t{i}") for i in range(3))) == dict.fromkeys(
        ("t0", "t1", "t2"), "12"
    )
    assert slurm.calls() == [f"sbatch --parsable {tmp_path}/jobs/t{i}.sh" for i in range(3)]
    assert "--array" not in (tmp_path / "jobs" / "t1.sh").read_text()


def test_no_array_has_more_runs_than_its_comment_can_name(
    slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path
) -> None:
    slurm.says("sbatch", out="12\n")
    submitted(launcher, *(run(tmp_path, token=f"{i:032x}") for i in range(64)))
    comments = [re.search("--comment=(.*)", path.read_text()) for path in (tmp_path / "jobs").glob("*.sh")]
    lengths = [len(found[1]) for found in comments if found]
    assert len(lengths) == 3
    assert max(lengths) <= slurm_queue.COMMENT_LENGTH


def test_a_token_that_could_not_be_read_back_is_a_bug(
    slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="token"):
        submitted(launcher, run(tmp_path, token="a,b"))  # noqa: S106 (no secret)
    assert slurm.calls() == []


def test_jobs_are_found_again_by_their_tokens(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says(
        "squeue",
        out=(
            "12_0|COMPLETED|hptool:a,b\n12_1|RUNNING|project | 7 hptool:a,b\n13|PENDING|hptool:a\n"
            "14|COMPLETED|hptool:a\n12_2|RUNNING|hptool:a,b\n15|RUNNING|\n16|RUNNING|b\n"
        ),
    )
    slurm.says("sacct", out="9_[0-3]|PENDING|hptool:c\n9|CANCELLED by 1000|hptool:c\n8|COMPLETED|hptool:c\n")
    assert launcher.find(["a", "b", "c", "d"]) == {"a": "13", "b": "12_1", "c": "9"}


def test_an_absent_controller_is_no_sign_of_absent_jobs(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(BusyError, match="Unable to contact slurm controller"):
        launcher.find(["a"])


LIMIT = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size"


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("sbatch: error: invalid partition specified: x\nsbatch: error: Invalid partition name specified", LaunchError),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", LaunchError),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", LaunchError),
        ("sbatch: unrecognized option '--container-image=x'", LaunchError),
        (f"sbatch: error: AssocMaxSubmitJobLimit\n{LIMIT}", BusyError),
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{LIMIT}", BusyError),
        (f"sbatch: error: QOSMaxNodePerJobLimit\n{LIMIT}", LaunchError),
        (LIMIT, BusyError),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", BusyError),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", BusyError),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", BusyError),
        (
            "sbatch: error: If munged is up, restart with --num-threads=10\nsbatch: error: Munge encode failed",
            BusyError,
        ),
        ("sbatch: error: Batch job submission failed: Protocol authentication error", BusyError),
    ],
)
def test_what_is_refused_for_good_and_what_for_now(
    said: str, error: type[LaunchError], slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path
) -> None:
    slurm.says("sbatch", err=said)
    with pytest.raises(LaunchError) as caught:
        submitted(launcher, run(tmp_path, token="t"))  # noqa: S106 (no secret)
    assert type(caught.value) is error
    assert str(caught.value).startswith("sbatch refused: ")
    assert said.splitlines()[0].partition("sbatch: ")[2] in str(caught.value)


def test_a_refusal_leaves_no_files(slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path) -> None:
    slurm.says("sbatch", err="sbatch: error: Batch job submission failed: Invalid qos specification")
    with pytest.raises(LaunchError):
        submitted(launcher, *(run(tmp_path, token=f"t{i}") for i in range(3)))
    assert list((tmp_path / "jobs").iterdir()) == []


def test_what_sbatch_may_have_done_is_looked_for_before_it_is_asked_again(
    slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path
) -> None:
    slurm.says("sbatch", err="sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    runs = [run(tmp_path, token=f"t{i}") for i in range(2)]
    with pytest.raises(BusyError):
        submitted(launcher, *runs)
    slurm.says("sbatch", out="13\n")
    slurm.says("squeue", out="12_0|PENDING|hptool:t0,t1\n12_1|PENDING|hptool:t0,t1\n")
    assert submitted(launcher, *runs) == {"t0": "12_0", "t1": "12_1"}
    assert sum(call.startswith("sbatch") for call in slurm.calls()) == 1


@pytest.mark.parametrize("then", ["submits another", "closes"])
def test_a_job_that_nobody_waits_for_is_cancelled(
    then: str, slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path
) -> None:
    slurm.says("sbatch", out="Submitted, but I will not tell you what\n")
    with pytest.raises(BusyError, match="gave no job id"):
        submitted(launcher, run(tmp_path, token="t"))  # noqa: S106 (no secret)
    slurm.says("squeue", out="12|PENDING|hptool:t\n")
    slurm.says("sbatch", out="13\n")
    if then == "closes":
        launcher.close()
    else:
        assert submitted(launcher, run(tmp_path, token="other")) == {"other": "13"}  # noqa: S106 (no secret)
    assert "scancel 12" in slurm.calls()


def test_an_array_that_is_too_long_for_a_limit_goes_in_parts(
    slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path
) -> None:
    # Takes arrays of two and no more, and five jobs in all.
    script = slurm.directory / "sbatch"
    script.write_text(
        f'#!/bin/bash\ncd {tmp_path}\nn=$(sed -n "s/#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p" "$2")\n'
        "had=$(cat had 2>/dev/null || echo 0); now=$((had + ${n:-0} + 1))\n"
        'if ((${n:-0} > 1 || now > 5)); then echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1; fi\n'
        "echo $now > had; echo $now\n"
    )
    started: list[str] = []
    with pytest.raises(BusyError, match="AssocMaxSubmitJobLimit"):
        launcher.submit([run(tmp_path, token=f"t{i}") for i in range(8)], lambda _, job_id: started.append(job_id))
    assert started == ["2_0", "2_1", "4_0", "4_1", "5"]


def test_secrets_go_to_sbatch_and_into_no_file(
    slurm: FakeSlurm, dgx_a100: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = replace(dgx_a100, environment={"WANDB_API_KEY": "hush-hush", "NCCL_DEBUG": "INFO"})
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # hptool itself in a job
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    slurm.says("sbatch", out="12\n")
    submitted(SlurmLauncher(site, tmp_path / "jobs", arrays=True), run(tmp_path, token="t"))  # noqa: S106 (no secret)
    had = slurm.environment("sbatch")
    assert (had["WANDB_API_KEY"], had["SLURM_CONF"]) == ("hush-hush", "/etc/slurm.conf")
    assert not {"NCCL_DEBUG", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID"} & had.keys()
    assert not [path for path in (tmp_path / "jobs").iterdir() if b"hush-hush" in path.read_bytes()]
    assert "# WANDB_API_KEY is a secret" in (tmp_path / "jobs" / "t.sh").read_text()

    slurm.says("sbatch", err="sbatch: error: cli_filter: WANDB_API_KEY=hush-hush is too short")
    with pytest.raises(LaunchError, match="WANDB_API_KEY=<masked: WANDB_API_KEY> is too short"):
        launch.submit_script(tmp_path / "jobs" / "t.sh", site)


def test_a_job_of_any_function(slurm: FakeSlurm, launcher: SlurmLauncher, tmp_path: Path) -> None:
    slurm.says("sbatch", out="12\n")
    job_id = launcher.start(time.sleep, 1, name="nap", nodes=3, max_minutes=0.5, token="t")  # noqa: S106 (no secret)
    assert job_id == "12"
    script = (tmp_path / "jobs" / "t.sh").read_text()
    for line in ("--job-name=nap", "--nodes=3", "--ntasks-per-node=1", "--time=1", "--comment=hptool:t"):
        assert f"#SBATCH {line}\n" in script


def test_the_log_of_an_earlier_launchers_job_is_found(launcher: SlurmLauncher, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier" / "12_0_log.out"
    earlier.parent.mkdir()
    earlier.touch()
    assert launcher.log_path("12") == earlier
    assert launcher.log_path("13") == tmp_path / "jobs" / "13_0_log.out"


def test_a_pending_job_that_can_never_start_is_cancelled(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", out="12|PENDING|PartitionNodeLimit\n")
    launcher.status(["12"])
    assert "scancel 12" in slurm.calls()


def test_without_slurm_there_is_one_clear_error(
    launcher: SlurmLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(LaunchError, match="sbatch: not found on this machine"):
        launcher.submit([run(tmp_path)], lambda *_: None)


def test_the_profile_decides_about_the_launcher(tmp_path: Path) -> None:
    assert isinstance(launch.launcher(files.read_cluster("dgx-h100"), tmp_path), SlurmLauncher)
    assert isinstance(launch.launcher(files.read_cluster("local"), tmp_path), launch.LocalLauncher)
