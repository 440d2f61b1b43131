"""How long a search takes to read back a directory of 10,000 outcomes, and what memory it takes for that.

    python -m tests.benchmarks.resume_outcomes

The bound to keep: under 2 seconds and 1 GB. For scale, the same records are read as plain JSON in the same run.
"""

import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from hptool import files
from hptool.course import next_order, standing
from hptool.plan import SearchRequest, make_plan
from hptool.results import ResultsDirectory
from hptool.training_agenda import rows_of, timings_of
from tests import samples

OUTCOMES = 10_000
STEPS = 50


def main() -> None:
    """Write the directory, then go on with it as `--resume` does up to the first new job."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        plan = make_plan(SearchRequest(model="gpt3/175b", cluster="dgx-a100", results=path, limit_search_runs=OUTCOMES))
        results = ResultsDirectory(path)
        results.begin(plan.document(), resume=False)
        _fill(path, [layout.name for layout in plan.candidates.layouts.rows()])
        results.close()

        before = time.perf_counter()
        for line in (path / "outcomes.jsonl").read_text().splitlines():
            json.loads(line)
        plain_s = time.perf_counter() - before

        before = time.perf_counter()
        results.begin(plan.document(), resume=True)
        records, submissions = results.outcomes(), results.submissions()
        read_s = time.perf_counter() - before
        course = plan.course
        timings = timings_of(course, rows_of(course), records.values())
        standing(course, timings)
        next_order(course, timings)
        all_s = time.perf_counter() - before
        results.close()
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(records)} outcomes and {len(submissions)} submissions of {len(plan.candidates.layouts)} layouts")
    print(f"read in {read_s:.2f} s, {read_s / plain_s:.1f} times plain JSON; next run chosen after {all_s:.2f} s")
    print(f"most memory {gib:.2f} GiB")


def _fill(path: Path, names: list[str]) -> None:
    measured = samples.measurement()
    times = tuple(0.5 + 0.001 * (k % 7) for k in range(STEPS))
    measured = replace(measured, step_times_s=times, step_time_s=sorted(times)[STEPS // 2], losses=tuple(times))
    measured = replace(measured, step_time_low_s=min(times), step_time_high_s=max(times))
    outcomes, submissions = [], []
    for i in range(OUTCOMES):
        name, again = names[i % len(names)], i // len(names)
        run = name if not again else f"{name}.{again + 1}"
        outcome = samples.failure() if i % 3 == 0 else measured
        submissions.append(files.json_text(samples.submission(name, run=run, job_id=str(i)), indent=None).strip())
        outcomes.append(files.json_text(samples.record(name, outcome, run=run, job_id=str(i)), indent=None).strip())
    (path / "outcomes.jsonl").write_text("\n".join(outcomes) + "\n")
    (path / "submissions.jsonl").write_text("\n".join(submissions) + "\n")


if __name__ == "__main__":
    main()
