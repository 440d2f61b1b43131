"""What a search costs besides its training steps: the share of its time that is hptool's own.

    python -m tests.benchmarks.search_overhead

Ten layouts on this machine, from the start of the command to its end. Left out are
importing (of the command, and of torch and Megatron-core in the job) and the training steps by their own clock; what is
left is hptool's: planning, predicting, forking ranks, joining them, building the models, writing, waiting, reporting.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYOUTS = 10
SEARCH = (
    "search-train", "--model", "gpt3/tiny", "--cluster", "local", "--strategy", "ranked", "--yes",
    "--limit-search-runs", str(LAYOUTS),
)  # fmt: skip

#: What the searches differ in. hptool's own time is the same for each layout, whatever its steps take.
CASES = {
    "the tiny GPT-3, 50 steps": ("--stages", "50"),
    "a model whose steps take about a second, 20 steps": (
        "--stages", "20", "model.num_layers=8", "model.hidden_size=256", "model.ffn_hidden_size=1024",
        "model.encoder_seq_length=256", "model.max_position_embeddings=256", "model.data.seq_length=256",
    ),
}  # fmt: skip

_STEP_S = re.compile(r"^step .*, ([0-9.]+) s$", re.MULTILINE)


def seconds(*words: str) -> float:
    """How long Python takes for it."""
    before = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - before


def main() -> None:
    """Print the shares."""
    imports_s = seconds("-c", "import hptool.search")
    imports_s += seconds("-c", "import submitit; from hptool.worker.supervisor import *; load_framework('cpu')")
    for name, words in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "run"
            whole_s = seconds("-m", "hptool", *SEARCH, "--results", str(results), *words)
            logs = list(results.glob("runs/*/logs/rank-0.log"))
            steps_s = sum(float(found) for log in logs for found in _STEP_S.findall(log.read_text()))
        own_s = whole_s - imports_s - steps_s
        print(f"{name}: {len(logs)} layouts in {whole_s:.1f} s, {steps_s:.1f} s of steps, {imports_s:.1f} s of imports")
        print(f"  hptool's own: {own_s:.1f} s, {own_s / whole_s:.1%} of the search, {own_s / len(logs):.2f} s a layout")


if __name__ == "__main__":
    main()
