"""Whole searches through a real Slurm while things go wrong there: nothing is lost, run twice or left behind."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.searches import TINY, outcome_lines, processes_of, wait_for
from tests.slurm.conftest import DevSlurm, heal

pytestmark = pytest.mark.slurm

#: How old a job must be to outlive a killed controller, which saves its state every five seconds.
SAVED_S = 8

#: Longer than anything here should take on a busy machine.
PATIENCE_S = 150

KILLS = 5


@dataclass(kw_only=True)
class Drill:
    """A results directory, the Slurm that runs its jobs, and every search that was started in it."""

    slurm: DevSlurm
    settings: dict[str, str]
    directory: Path
    searches: list["Search"] = field(default_factory=list)

    @property
    def results(self) -> Path:
        return self.directory / "run"

    def profile(self, **options: Any) -> Path:
        """The development profile with two nodes of one rank each, and room for several jobs on a node."""
        document = yaml.safe_load((ROOT / "cluster" / "dev-slurm.yaml").read_text())
        document |= {"nodes": 2, "gpus_per_node": 1}
        document["slurm"] |= {"mem_gib_per_node": 2, "extra_options": {"gpus-per-node": 1}, "poll_s": 0.5, **options}
        path = self.directory / "site.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def search(self, *words: str, path: str | None = None) -> "Search":
        """Starts hptool on layouts of one node; those that differ in `--mbs`, two steps each, unless `words` differ."""
        profile = self.directory / "site.yaml"
        if not profile.exists():
            self.profile()
        command = [sys.executable, "-m", "hptool", "search-train", "--cluster", str(profile)]
        command += ["--results", str(self.results), *TINY, "--nodes", "1", "--tp", "1", "--pp", "1", "--stages", "2"]
        said = self.directory / f"said-{len(self.searches)}"
        with said.open("w") as file:
            process = subprocess.Popen(
                [*command, *words], stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
                env=os.environ | ({"PATH": path} if path else {}),
            )  # fmt: skip
        self.searches.append(Search(process=process, file=said))
        return self.searches[-1]

    def queue(self) -> list[str]:
        """Jobs that Slurm still means to run or runs."""
        return self.slurm.command("squeue", "--me", "-h", "-r", "-o", "%i").split()

    def wait(self, condition: Callable[[], object]) -> None:
        """As `wait_for`, with everything that was said where it is in vain."""
        wait_for(condition, PATIENCE_S, otherwise=self.story)

    def story(self) -> str:
        """For a test that has to say why it failed."""
        logs = [path for path in sorted(self.results.rglob("*")) if path.suffix in (".log", ".out", ".jsonl")]
        files = [*(search.file for search in self.searches), *logs]
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def ranks(self) -> list[int]:
        """Processes that train now: they write into the logs of their runs."""
        found = []
        for output in Path("/proc").glob("[0-9]*/fd/1"):
            try:
                log = output.readlink()
            except OSError:
                continue
            if log.is_relative_to(self.results / "runs") and log.name.startswith("rank-"):
                found.append(int(output.parts[2]))
        return found

    def freeze(self) -> int:
        """Stops the next rank that starts, so that its run lasts until it is let go on or ended."""
        self.wait(self.ranks)
        rank = self.ranks()[0]
        os.kill(rank, signal.SIGSTOP)
        return rank

    def job_of(self, rank: int) -> str:
        """Slurm's id of the job that a rank belongs to."""
        run = Path(f"/proc/{rank}/fd/1").readlink().parent.parent.name
        lines = map(json.loads, (self.results / "submissions.jsonl").read_text().splitlines())
        return str([line["job_id"] for line in lines if line["run"] == run][-1]).partition("#")[0]

    def node(self, job_id: str) -> str:
        """Where a job runs."""
        return self.slurm.command("squeue", "-h", "-j", job_id, "-o", "%N").strip()

    def take_out(self, node: str, state: str) -> None:
        self.slurm.command("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=drill")

    def records(self) -> list[dict[str, Any]]:
        """All outcomes, after a look at whether each layout was timed once, but for what was lost."""
        lines = outcome_lines(self.results)
        assert len({line["run"] for line in lines}) == len(lines), self.story()
        settled = Counter(line["name"] for line in lines if not line["may_run_again"])
        assert set(settled.values()) <= {1}, self.story()
        left = {path.parent.name for path in self.results.glob("runs/*/measurement.json")}
        assert left == {line["run"] for line in lines if line["measurement"]}, self.story()
        return lines

    def measured(self) -> set[int]:
        """The micro batch sizes that were timed."""
        names = [line["name"] for line in self.records() if line["measurement"]]
        return {int(name.partition("-mbs")[2].partition("-")[0]) for name in names}


@dataclass(kw_only=True)
class Search:
    """One hptool process, in a session of its own as in a terminal."""

    process: subprocess.Popen[bytes]
    file: Path

    @property
    def said(self) -> str:
        return self.file.read_text()

    def end(self) -> int:
        """Its exit code, when it has come to its end."""
        return self.process.wait(PATIENCE_S)

    def signal(self, *signals: signal.Signals) -> None:
        """To the whole session, as a terminal sends them."""
        for signum in signals:
            os.killpg(self.process.pid, signum)


@pytest.fixture
def drill(private_slurm: DevSlurm, private_settings: dict[str, str], tmp_path: Path) -> Iterator[Drill]:
    found = Drill(slurm=private_slurm, settings=private_settings, directory=tmp_path)
    yield found
    for search in found.searches:
        if search.process.poll() is None:
            search.process.kill()
            search.process.wait()
            pytest.fail(f"a search goes on\n{found.story()}")
        assert "Traceback" not in search.said, search.said
    assert found.queue() == [], f"a search left jobs behind\n{found.story()}"
    wait_for(lambda: not processes_of(found.results), otherwise=lambda: "\n".join(processes_of(found.results)))


def test_a_controller_that_dies_and_a_second_search(drill: Drill) -> None:
    search = drill.search("--mbs", "1,2", "--submit", "packed")
    rank = drill.freeze()
    drill.wait(lambda: float(drill.slurm.command("squeue", "-h", "-o", "%M").strip().partition(":")[2]) > SAVED_S)
    os.kill(drill.slurm.pids()["slurmctld"], signal.SIGKILL)
    drill.wait(lambda: "running, Slurm does not answer" in search.said)
    other = drill.search("--mbs", "1,2", "--submit", "packed", "--resume")
    assert other.end() == 2
    assert f"hptool is at work in it already (process {search.process.pid} on " in other.said
    heal(drill.settings)
    os.kill(rank, signal.SIGCONT)
    assert search.end() == 0, drill.story()
    assert drill.measured() == {1, 2}
    assert len(drill.records()) == 2


def test_a_node_that_fails_under_its_job(drill: Drill) -> None:
    search = drill.search("--mbs", "1,2", "--submit", "packed")
    node = drill.node(drill.job_of(drill.freeze()))
    os.kill(drill.slurm.pids()[f"slurmd-{node}"], signal.SIGKILL)
    drill.take_out(node, "DOWN")
    assert search.end() == 0, drill.story()
    assert "NODE_FAIL" in search.said
    assert "none of the layout's doing, to be run again" in search.said
    assert [line["may_run_again"] for line in drill.records()] == [True, False, False]
    assert drill.measured() == {1, 2}
    # What went on where Slurm saw it no more has ended itself.
    drill.wait(lambda: not processes_of(drill.results))


def test_a_slow_run_a_drained_node_and_a_requeue_hold_up_nothing(drill: Drill) -> None:
    drill.profile(requeue=True)
    search = drill.search("--mbs", "1,2,4", "--submit", "separate", "--parallel", "2")
    slow = drill.job_of(drill.freeze())
    drill.wait(lambda: len(outcome_lines(drill.results)) == 1)
    drill.take_out(drill.node(slow), "DRAIN")
    drill.wait(lambda: len(outcome_lines(drill.results)) == 2)
    drill.slurm.command("scontrol", "requeue", slow)
    assert search.end() == 0, drill.story()
    assert drill.measured() == {1, 2, 4}
    records = drill.records()
    assert len({record["name"] for record in records}) == 3
    assert records[2]["job_id"] == slow
    assert f"{records[2]['run']}: pending, BeginTime" in search.said


def test_a_full_queue(drill: Drill, limit_jobs: Callable[[int], None]) -> None:
    limit_jobs(0)
    search = drill.search("--mbs", "1,2", "--submit", "array")
    drill.wait(lambda: "AssocMaxSubmitJobLimit" in search.said)
    assert "trying again in 5 s" in search.said
    limit_jobs(-1)
    assert search.end() == 0, drill.story()
    assert drill.measured() == {1, 2}
    assert len(list((drill.results / "runs").iterdir())) == 2


#: squeue as it is on a cluster of thousands of jobs, but with real answers.
SLOW = """#!/bin/sh
sleep 2
PATH=${PATH#*:} exec squeue "$@"
"""


def test_a_controller_that_is_slow_to_answer(drill: Drill) -> None:
    squeue = drill.directory / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(SLOW)
    squeue.chmod(0o755)
    slow = f"{squeue.parent}:{os.environ['PATH']}"
    words = ("--mbs", "1", "--submit", "separate")
    search = drill.search(*words, path=slow)
    drill.freeze()
    search.signal(signal.SIGINT)
    assert search.end() == 128 + signal.SIGINT, drill.story()
    assert drill.queue() == []
    search = drill.search(*words, "--resume", path=slow)
    assert search.end() == 0, drill.story()
    assert drill.measured() == {1}


@pytest.mark.parametrize(("submit", "steps"), [("packed", "8"), ("array", "2")])
def test_killed_again_and_again(drill: Drill, submit: str, steps: str) -> None:
    words = ("--mbs", "1,2,4,8", "--submit", submit, "--stages", steps, "--resume")
    chance = random.Random(submit)
    for _ in range(KILLS):
        search = drill.search(*words)
        try:
            search.process.wait(chance.uniform(1.2, 4))
        except subprocess.TimeoutExpired:
            search.process.kill()
            search.process.wait()
    last = drill.search(*words)
    assert last.end() == 0, drill.story()
    assert drill.measured() == {1, 2, 4, 8}
    assert all(line["measurement"] for line in drill.records()), drill.story()
    assert sum(search.process.returncode == -signal.SIGKILL for search in drill.searches) >= 3
    # Nothing that was begun was begun again.
    assert len(list(drill.results.glob("runs/*/logs"))) == len(drill.records()), drill.story()


@pytest.mark.parametrize("submit", ["packed", "separate"])
def test_a_job_that_is_killed_for_memory(drill: Drill, submit: str) -> None:
    drill.profile(mem_gib_per_node=1)
    longer = [f"model.{key}=2048" for key in ("encoder_seq_length", "data.seq_length", "max_position_embeddings")]
    search = drill.search("--mbs", "8", "--submit", submit, *longer)
    assert search.end() == 4, drill.story()
    (record,) = drill.records()
    assert record["failure"]["kind"] == "oom", drill.story()
    assert "1 × oom" in search.said


def test_signals_leave_nothing_but_what_is_left_to_do(drill: Drill) -> None:
    words = ("--mbs", "1,2", "--resume")
    for signals in ([signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT, signal.SIGTERM]):
        search = drill.search(*words)
        drill.wait(lambda: outcome_lines(drill.results))  # of the first layout, which is not timed again
        drill.freeze()
        search.signal(*signals)
        assert search.end() == 128 + signals[0], drill.story()
        assert drill.queue() == [], drill.story()
        assert search.said.count("cancelling ") == 1, search.said
        assert "left for --resume: tp1-pp1-vpp1-cp1-mbs1-none" in search.said
        assert "interrupted; --resume goes on from here" in search.said
        wait_for(lambda: not processes_of(drill.results))
        assert len(drill.records()) == 1
    # Also of an allocation that has not been given yet.
    drill.take_out(",".join(drill.slurm.nodes), "DRAIN")
    search = drill.search(*words)
    drill.wait(drill.queue)
    search.signal(signal.SIGINT)
    assert search.end() == 128 + signal.SIGINT
    assert drill.queue() == []
    heal(drill.settings)
    assert drill.search(*words).end() == 0
    assert drill.measured() == {1, 2}
