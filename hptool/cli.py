"""The commands: they parse, call and print. The only print and the only exit code."""

import contextlib
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from hptool import __version__
from hptool.candidates import Recompute, SearchSpace
from hptool.errors import HptoolError, InputError, LaunchError, NoFeasibleLayout

#: What a shell expects of a command that a signal ended.
_SIGNALLED = 128

#: How often progress is told where no terminal shows it.
_TELL_S = 10.0


class _ListOrAuto(click.ParamType[Any]):
    """Words between commas, or `auto` for None."""

    name = "list|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return None if value == "auto" else tuple(item for word in value.split(",") for item in self.items(word))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def items(self, word: str) -> Sequence[Any]:
        """What one word stands for; ValueError where it stands for nothing."""
        raise NotImplementedError


class _Integers(_ListOrAuto):
    def items(self, word: str) -> Sequence[int]:
        if not re.fullmatch(r"[0-9]+", word):
            raise ValueError(f"{word!r} given, allowed is auto or whole numbers such as 1,2,4")
        return [int(word)]


class _Words(_ListOrAuto):
    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed

    def items(self, word: str) -> Sequence[str]:
        if word not in self._allowed:
            raise ValueError(f"{word!r} given, allowed is auto or some of {', '.join(self._allowed)}")
        return [word]


class _RecomputeModes(_ListOrAuto):
    def items(self, word: str) -> Sequence[tuple[Recompute, int | None]]:
        match = re.fullmatch(r"(none|selective|full)|(uniform|block)(?:-?([0-9]+))?", word)
        if match is None:
            raise ValueError(f"{word!r} given, allowed is auto, none, selective, full, uniform[-N], block[-N]")
        plain, method, count = match.groups()
        if plain == "full":
            return [(Recompute.UNIFORM, None), (Recompute.BLOCK, None)]
        if plain:
            return [(Recompute[plain.upper()], None)]
        return [(Recompute[method.upper()], int(count) if count else None)]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hptool")
def main() -> None:
    """Find the fastest way to train a language model on the GPUs that you have."""


#: Options that list values of a search axis.
_AXES = ("tp", "pp", "vpp", "cp", "ep", "mbs", "recompute")

_EXAMPLES = """\b
Examples:
  hptool search-train --model gpt3/tiny --cluster local --limit-search-runs 6
  hptool search-train --model gpt3/5b --cluster dgx-a100 --nodes 16 --tp 1,2,4 --dry-run
  hptool search-train --model my.yaml --cluster my-cluster.yaml trainer.precision=bf16
"""


@main.command("search-train", epilog=_EXAMPLES)
@click.option("--model", required=True, help="A preset such as gpt3/126m, or the path of a NeMo-Megatron YAML config.")
@click.option("--cluster", required=True, help="A profile such as local or dgx-a100, or the path of one.")
@click.option("--nodes", type=int, help="Nodes of the full training.  [default: all of the profile]")
@click.option(
    "--strategy",
    default="adaptive",
    show_default=True,
    help="adaptive learns from each run and stops when none is expected to gain 1 %; ranked, grid, random, optuna.",
)
@click.option("--limit-search-runs", type=int, default=10, show_default=True, help="Layouts to measure at most.")
@click.option("--budget-gpu-hours", type=float, help="Start no run that would cost more than this in all.")
@click.option("--max-hours", type=float, help="End the search after this time.")
@click.option(
    "--max-minutes-per-run", type=float, default=20.0, show_default=True, help="A longer run is killed as a timeout."
)
@click.option(
    "--max-steps-per-run",
    type=int,
    default=50,
    show_default=True,
    help="Steps of the longest timing, warm-up included.",
)
@click.option(
    "--stages",
    type=_Integers(),
    default="auto",
    show_default=True,
    help="Steps of the timings of a layout: short for many, long for finalists. auto is 8, 20 and --max-steps-per-run.",
)
@click.option("--verify-nodes", type=int, metavar="N", help="Run the best layouts on N nodes at the end.")
@click.option("--verify-top", type=int, default=2, show_default=True, help="How many of them.")
@click.option(
    "--submit",
    type=click.Choice(["separate", "array", "packed", "hyperqueue"]),
    help="Jobs of their own, arrays, or one allocation for one run after the other.  [default: the cheaper way]",
)
@click.option("--parallel", type=int, help="Runs at once.  [default: 3 on Slurm where a strategy learns, 1 locally]")
@click.option("-y", "--yes", is_flag=True, help="Launch without asking whether the cost is right.")
@click.option("--output-top-n", type=int, default=10, show_default=True, help="Layouts in the terminal table.")
@click.option("--tp", type=_Integers(), default="auto", show_default=True, help="Tensor parallel sizes.")
@click.option("--pp", type=_Integers(), default="auto", show_default=True, help="Pipeline parallel sizes.")
@click.option("--vpp", type=_Integers(), default="auto", show_default=True, help="Virtual pipeline sizes; 1 is none.")
@click.option("--cp", type=_Integers(), default="auto", show_default=True, help="Context parallel sizes.")
@click.option("--ep", type=_Integers(), default="auto", show_default=True, help="Expert parallel sizes.")
@click.option("--mbs", type=_Integers(), default="auto", show_default=True, help="Micro batch sizes.")
@click.option(
    "--recompute",
    type=_RecomputeModes(),
    default="auto",
    show_default=True,
    help="Activation checkpointing: none, selective, uniform[-N], block[-N], full (uniform and block).",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8"]),
    help="What GEMMs compute in; fp8 needs Transformer Engine on the nodes.  [default: the model's]",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Directory of this search.  [default: results/MODEL-CLUSTER-NODESn]",
)
@click.option("--dry-run", is_flag=True, help="Rank and write everything, launch nothing.")
@click.option("--resume", is_flag=True, help="Go on with the search in that directory; start it where there is none.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def search_train_command(
    as_json: bool,  # noqa: FBT001 (click passes by name)
    yes: bool,  # noqa: FBT001 (as above)
    output_top_n: int,
    precision: str | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Search for the fastest layout to train a model with.

    Enumerates the layouts, predicts memory and step time of each, says what the search will cost, times the best as
    jobs, learns from each, and reports the winner. KEY=VALUE overrides any key of the config.
    """
    space = SearchSpace(**{axis: options.pop(axis) for axis in _AXES})
    _terminate_like_ctrl_c()
    try:
        if output_top_n < 1:
            raise InputError(f"--output-top-n: {output_top_n} given, allowed is 1 or more")
        # Here and not above, because pandas and submitit take a second that --help should not cost.
        from rich.console import Console  # noqa: PLC0415

        from hptool import report, search, watch  # noqa: PLC0415
        from hptool.nemo_keys import PRECISION_OVERRIDES  # noqa: PLC0415
        from hptool.plan import SearchRequest  # noqa: PLC0415

        chosen = PRECISION_OVERRIDES[precision] if precision else ()
        request = SearchRequest(space=space, overrides=(*chosen, *overrides), **options)
        # Who cannot be asked has decided already.
        asks = not yes and sys.stdin.isatty() and sys.stderr.isatty()
        with watch.screen(Console(stderr=True, highlight=False), _say) as screen:
            made, directory = search.search_train(request, screen, lambda: not asks or screen.confirm("Launch?"))
        if as_json:
            click.echo(json.dumps(report.as_json(made, directory), indent=2))
        else:
            report.print_table(made, Console(highlight=False), output_top_n)
            for script in search.scripts(directory, made)[:1] if request.dry_run else []:
                click.echo(f"the job of the first of them, {script}:\n\n{script.read_text(encoding='utf-8')}")
            click.echo(f"report: {directory / 'report.html'}")
        if made.winner is None and made.spent.ended is not None:
            reason = report.why_nothing_ran(made) if made.rows else f"nothing was run: {made.spent.ended}."
            raise LaunchError(f"{reason} See {directory / 'report.html'}")
    except HptoolError as error:
        _fail(error)
    except KeyboardInterrupt as interrupt:
        _interrupted(interrupt)


_INFERENCE_EXAMPLES = """\b
Examples:
  hptool search-inference --model gpt3/tiny --cluster local --workload 32:8 --batch-sizes 1,2,4
  hptool search-inference --model gpt3/5b --cluster dgx-a100 --workload 60:20,200:200 --max-latency-ms 2000
  hptool search-inference --settings search_config/gpt3/5b.yaml --cluster dgx-a100 --dry-run
  hptool search-inference --model llama/llama3_8b --cluster my.yaml --engine command --command \\
    "python time_vllm.py --batch {batch} --input {input_len} --output {output_len} --tp {tp}"
"""


@main.command("search-inference", epilog=_INFERENCE_EXAMPLES)
@click.option("--model", help="A preset such as gpt3/5b, or the path of a NeMo-Megatron YAML config.")
@click.option("--cluster", required=True, help="A profile such as local or dgx-a100, or the path of one.")
@click.option(
    "--settings",
    type=click.Path(path_type=Path),
    help="A search config of the BigNLP HP tool, for its inference_settings; options given here come before them.",
)
@click.option(
    "--workload",
    metavar="IN:OUT[,IN:OUT]...",
    help="Tokens of a prompt and of its answer, for each kind of request.  [default: 60:20]",
)
@click.option("--nodes", type=int, help="Nodes that a replica may have at most.  [default: all of the profile]")
@click.option("--tp", type=_Integers(), default="auto", show_default=True, help="Tensor parallel sizes.")
@click.option("--pp", type=_Integers(), default="auto", show_default=True, help="Pipeline parallel sizes.")
@click.option(
    "--batch-sizes", type=_Integers(), default="auto", show_default=True, help="Requests at once; auto is 1 to 256."
)
@click.option(
    "--precision",
    type=_Words(("fp32", "bf16", "fp16", "fp8")),
    default="auto",
    show_default=True,
    help="What GEMMs compute in: fp32, bf16, fp16, fp8; auto is the model's.",
)
@click.option(
    "--cuda-graphs",
    type=_Words(("on", "off")),
    default="auto",
    show_default=True,
    help="Launch kernels as graphs: on, off; auto tries both on a GPU.",
)
@click.option("--max-latency-ms", type=float, help="The longest that an answer may take.")
@click.option("--max-ttft-ms", type=float, help="The longest that its first token may take.")
@click.option("--max-tpot-ms", type=float, help="The longest that each token after it may take.")
@click.option(
    "--percentile",
    type=click.Choice(["50", "95", "99"]),
    default="50",
    show_default=True,
    help="Of the requests of which the limits are to hold.",
)
@click.option(
    "--objective",
    type=click.Choice(["throughput-per-gpu", "latency", "pareto"]),
    default="throughput-per-gpu",
    show_default=True,
    help="What is wanted most, within the limits.",
)
@click.option(
    "--strategy",
    default="guided",
    show_default=True,
    help="guided learns from each run and stops when none is expected to gain 1 %; bisect, ranked, grid.",
)
@click.option("--limit-search-runs", type=int, default=50, show_default=True, help="Points to measure at most.")
@click.option("--budget-gpu-hours", type=float, help="Start no run that would cost more than this in all.")
@click.option("--max-hours", type=float, help="End the search after this time.")
@click.option("--max-minutes-per-run", type=float, help="A longer run, of several points, is killed.  [default: 30]")
@click.option("--repeats", type=int, default=5, show_default=True, help="Timed passes of each point.")
@click.option(
    "--engine",
    type=click.Choice(["megatron", "command"]),
    default="megatron",
    show_default=True,
    help="Who answers: hptool's loop over megatron-core, or a command of yours.",
)
@click.option("--command", help="That command; docs/worker.md says what it prints.")
@click.option("--checkpoint", help="A checkpoint of hptool train.  [default: random weights]")
@click.option(
    "--submit",
    type=click.Choice(["separate", "array", "packed", "hyperqueue"]),
    help="Jobs of their own, arrays, or one allocation for one run after the other.  [default: the cheaper way]",
)
@click.option("--parallel", type=int, help="Runs at once.  [default: 2 on Slurm, 1 locally]")
@click.option("-y", "--yes", is_flag=True, help="Launch without asking whether the cost is right.")
@click.option("--output-top-n", type=int, default=10, show_default=True, help="Points in the terminal table.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Directory of this search.  [default: results/MODEL-serving-CLUSTER-NODESn]",
)
@click.option("--dry-run", is_flag=True, help="Rank and write everything, launch nothing.")
@click.option("--resume", is_flag=True, help="Go on with the search in that directory; start it where there is none.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def search_inference_command(as_json: bool, yes: bool, output_top_n: int, **options: Any) -> None:  # noqa: FBT001 (click passes by name)
    """Search for the fastest way to serve a model.

    Predicts latency and memory of every layout, batch and kind of request, times the most promising as jobs, learns
    from each, and reports the best within your limits and all that are beaten by none.
    """
    _terminate_like_ctrl_c()
    try:
        if output_top_n < 1:
            raise InputError(f"--output-top-n: {output_top_n} given, allowed is 1 or more")
        # Here and not above, because pandas and submitit take a second that --help should not cost.
        from rich.console import Console  # noqa: PLC0415

        from hptool import serving_report, serving_search, watch  # noqa: PLC0415
        from hptool.serving_settings import request_of  # noqa: PLC0415

        request, remarks = request_of(options)
        for remark in remarks:
            _say(remark)
        asks = not yes and sys.stdin.isatty() and sys.stderr.isatty()
        with watch.screen(Console(stderr=True, highlight=False), _say) as screen:
            made, directory = serving_search.search_inference(
                request, screen, lambda: not asks or screen.confirm("Launch?")
            )
        _print_serving(made, directory, output_top_n, as_json=as_json)
        if not as_json and request.dry_run:
            for script in serving_search.scripts(directory)[:1]:
                click.echo(f"the job of the first of them, {script}:\n\n{script.read_text(encoding='utf-8')}")
        if made.spent.ended is not None:
            why = serving_report.why_nothing(made)
            if why is not None and not any(row.served for row in made.rows):
                raise LaunchError(f"{why} See {directory / 'report.html'}")
            if why is not None:
                raise NoFeasibleLayout(f"{why} See {directory / 'report.html'}")
    except HptoolError as error:
        _fail(error)
    except KeyboardInterrupt as interrupt:
        _interrupted(interrupt)


def _print_serving(made: Any, directory: Path, top: int, *, as_json: bool) -> None:
    from rich.console import Console  # noqa: PLC0415 (because --help should not wait for them)

    from hptool import serving_report  # noqa: PLC0415

    if as_json:
        click.echo(json.dumps(serving_report.as_json(made, directory), indent=2))
    else:
        serving_report.print_table(made, Console(highlight=False), top)
        click.echo(f"report: {directory / 'report.html'}")


def _interrupted(interrupt: KeyboardInterrupt) -> NoReturn:
    """Ends a search that somebody ended, with how to go on."""
    number = interrupt.args[0] if interrupt.args else signal.SIGINT
    words = [word for word in sys.argv[1:] if word != "--resume"]
    click.echo(f"hptool: interrupted; --resume goes on from here: hptool {shlex.join([*words, '--resume'])}", err=True)
    sys.exit(_SIGNALLED + number)


_PREDICT_EXAMPLES = """\b
Examples:
  hptool predict --model gpt3/175b --cluster dgx-a100 --nodes 128
  hptool predict --model gpt3/175b --cluster dgx-a100 --nodes 128 --explain tp8-pp8
  hptool predict --model gpt3/175b --cluster dgx-a100 --nodes 128 --dry-run-memory tp8-pp8
  hptool predict runs.csv --output predicted.csv
  hptool predict runs.csv --output predicted.csv --calibrate measured.csv
"""


@main.command("status")
@click.argument("results", type=click.Path(path_type=Path), metavar="RESULTS")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def status_command(results: Path, as_json: bool) -> None:  # noqa: FBT001 (click passes by name)
    """Show how a search stands, from any shell.

    RESULTS is the search's directory.
    """
    try:
        from rich.console import Console  # noqa: PLC0415 (because --help should not wait for it)

        from hptool import watch  # noqa: PLC0415
        from hptool.results import ResultsDirectory  # noqa: PLC0415

        now = watch.of_directory(ResultsDirectory(results))
        if as_json:
            click.echo(json.dumps(watch.as_json(now), indent=2))
        else:
            Console(highlight=False).print(watch.table(now))
    except HptoolError as error:
        _fail(error)


@main.command("report")
@click.argument("results", type=click.Path(path_type=Path), metavar="RESULTS")
@click.option("--output-top-n", type=click.IntRange(min=1), default=10, show_default=True, help="Layouts in the table.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def report_command(results: Path, output_top_n: int, as_json: bool) -> None:  # noqa: FBT001 (click passes by name)
    """Make the report of a search anew, from its records.

    RESULTS is the search's directory; whether the search is at work, was interrupted or is done does not matter.
    """
    try:
        from rich.console import Console  # noqa: PLC0415 (because --help should not wait for them)

        from hptool import report, search, serving_search  # noqa: PLC0415
        from hptool.results import ResultsDirectory  # noqa: PLC0415

        if ResultsDirectory(results).kind() == "serving":
            found = serving_search.read_serving_report(results.absolute())
            return _print_serving(found, results.absolute(), output_top_n, as_json=as_json)
        made = search.read_report(results.absolute())
        if as_json:
            click.echo(json.dumps(report.as_json(made, results.absolute()), indent=2))
        else:
            report.print_table(made, Console(highlight=False), output_top_n)
            click.echo(f"report: {results / 'report.html'}")
    except HptoolError as error:
        _fail(error)


@main.command("predict", epilog=_PREDICT_EXAMPLES)
@click.option("--model", help="A preset such as gpt3/126m, or the path of a NeMo-Megatron YAML config.")
@click.option("--cluster", help="A profile such as local or dgx-a100, or the path of one.")
@click.option("--nodes", type=int, help="Nodes of the training.  [default: all of the profile]")
@click.option("--framework", help="Whose kernels and buffers to predict.  [default: hptool-worker]")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Layouts in the ranked table.")
@click.option("--explain", metavar="LAYOUT", help="Show where each second and GiB of it goes, e.g. tp8-pp8.")
@click.option("--dry-run-memory", metavar="LAYOUT", help="Trace a real rank of it, without a GPU.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the table with its predictions goes.")
@click.option("--calibrate", type=click.Path(path_type=Path), help="A table of measured runs to learn from.")
@click.option("--columns", is_flag=True, help="Say what columns a table has, and what empty cells stand for.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("words", nargs=-1, metavar="[ROWS.csv | KEY=VALUE...]")
def predict_command(as_json: bool, columns: bool, words: tuple[str, ...], **options: Any) -> None:  # noqa: FBT001 (click passes by name)
    """Predict step time and memory, measuring nothing.

    With --model: every layout of a model on a cluster, ranked. With ROWS.csv: each row of a table of runs, in the
    columns of published tables (--columns lists them); rows with measured columns show how good the predictions are.
    A table with the columns batch, input_len and output_len is one of served points: latency, time to the first token
    and of each token, and memory.
    """
    _terminate_like_ctrl_c()
    try:
        from rich.console import Console  # noqa: PLC0415 (as below, because pandas takes a second)

        from hptool import prediction  # noqa: PLC0415

        console = Console(highlight=False)
        if columns:
            made: prediction.Result = prediction.Columns()
        elif options["model"] is not None or options["cluster"] is not None:
            made = prediction.of_model(words, options, _say)
        else:
            made = prediction.of_table(words, options, _say)
        if as_json:
            click.echo(json.dumps(made.document(), indent=2))
        else:
            made.show(console)
    except HptoolError as error:
        _fail(error)
    except KeyboardInterrupt:
        click.echo("hptool: interrupted", err=True)
        sys.exit(_SIGNALLED + signal.SIGINT)


_RECOMMEND_EXAMPLES = """\b
Examples:
  hptool recommend --gpus 160 --days 5
  hptool recommend --gpus 64 --days 14 --gpu h100 --family llama --tokens 1T
  hptool recommend --model gpt3/20b --gpus 512
  hptool recommend --model gpt3/20b --days 10
  hptool recommend --gpus 160 --days 5 --tokens compute-optimal --size-factor 0.5
  hptool recommend --gpus 160 --days 5 --runs runs.csv --next-runs --plot fit.png
"""


@main.command("recommend", epilog=_RECOMMEND_EXAMPLES)
@click.option("--gpus", type=int, help="GPUs of the training.  [default: all of --cluster; with --model, found]")
@click.option("--days", type=float, help="Days that it may take.  [with --model, found]")
@click.option("--gpu", help="Kind of GPU, in the nodes in which it usually comes.  [default: a100-80gb]")
@click.option("--cluster", help="A profile such as dgx-a100, or the path of one, instead of --gpu.")
@click.option("--family", help="Family whose sizes to choose from.  [default: gpt3]")
@click.option("--model", help="One size, such as gpt3/20b: find its days or GPUs.")
@click.option(
    "--tokens",
    metavar="COUNT|compute-optimal",
    help="Tokens to train on, such as 300B; or as a scaling law advises.  [default: those of each preset]",
)
@click.option("--tflops", type=float, help="Model TFLOP/s of a GPU.  [default: predicted, for each size's best layout]")
@click.option(
    "--confidence", type=float, default=0.9, show_default=True, help="Probability with which a size must end in time."
)
@click.option("--law", help="A published scaling law: epoch, hoffmann, muennighoff.  [default: epoch]")
@click.option(
    "--runs", type=click.Path(path_type=Path), help="Own seed runs to fit a law to: CSV of parameters, tokens, loss."
)
@click.option("--keep-outliers", is_flag=True, help="Fit to all of --runs.")
@click.option("--next-runs", is_flag=True, help="Suggest the seed runs that would help the fit most.")
@click.option("--size-factor", type=float, help="What a model of so many times the optimal size costs.")
@click.option("--plot", type=click.Path(path_type=Path), help="Save a picture of the fit: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def recommend_command(as_json: bool, **options: Any) -> None:  # noqa: FBT001 (click passes by name)
    """Say what size to train on a budget of GPUs and days.

    With --model: the days that a size takes, or the GPUs that it needs. With --tokens compute-optimal, --law or
    --runs: the parameters and tokens of the least loss.
    """
    try:
        from rich.console import Console  # noqa: PLC0415 (as below, because --help should not wait for them)

        from hptool import recommendation  # noqa: PLC0415

        made = recommendation.answer(options, _say)
        if as_json:
            click.echo(json.dumps(made.document(), indent=2))
        else:
            made.show(Console(highlight=False))
    except HptoolError as error:
        _fail(error)


def _list_presets(context: click.Context, _option: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 (click's)
    """The presets with their parameters, and no more."""
    if not wanted:
        return
    from hptool import catalogue  # noqa: PLC0415 (because --help should not wait for it)

    for name in catalogue.preset_names():
        click.echo(f"{name:<24} {catalogue.preset(name).shape.num_parameters / 1e9:>10.4g}B")
    context.exit()


_BASE_CONFIG_EXAMPLES = """\b
Examples:
  hptool base-config --model gpt3/5b --nodes 20 --output gpt3_5b.yaml
  hptool base-config --model llama --size 1.5b --gpu h100-80gb --nodes 4
  hptool base-config --model t5/11b --cluster dgx-a100 --days 30
"""


@main.command("base-config", epilog=_BASE_CONFIG_EXAMPLES)
@click.option("--model", required=True, help="A preset such as gpt3/5b, a family with --size, or the path of a config.")
@click.option("--size", help="Any size, such as 6.7b or 350m: the shape follows the family's rule.")
@click.option("--cluster", help="A profile such as dgx-a100, or the path of one.")
@click.option("--gpu", help="Kind of GPU, in the nodes in which it usually comes.  [default: a100-80gb]")
@click.option("--nodes", type=int, help="Nodes of the training.  [default: those of the recipe]")
@click.option("--days", type=float, help="Time limit of the training.  [default: that of the recipe]")
@click.option("--seq-length", type=int, help="Another sequence length; a batch keeps its tokens.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the config goes.  [default: printed]")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option(
    "--list",
    "list_models",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_presets,
    help="Say which presets there are.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def base_config_command(as_json: bool, **options: Any) -> None:  # noqa: FBT001 (click passes by name)
    """Write a training config that runs, with the best predicted layout for its nodes.

    Keys are NeMo-Megatron's; KEY=VALUE overrides any of them.
    """
    try:
        from hptool import configuration  # noqa: PLC0415 (because --help should not wait for it)

        made = configuration.make_config(configuration.ConfigRequest(**options), _say)
        if as_json:
            click.echo(json.dumps(made.document(), indent=2))
        elif options["output"] is None:
            click.echo(made.text, nl=False)
        else:
            _say(f"written to {options['output']}")
    except HptoolError as error:
        _fail(error)


_TRAIN_EXAMPLES = """\b
Examples:
  hptool train --config results/gpt3_5b/optimal.yaml --data /data/my_set
  hptool train --config optimal.yaml --data novel.txt --prompt "It was" model.tokenizer.library=byte-level
  hptool train --config optimal.yaml --results results/gpt3_5b/training --resume
  hptool train --config optimal.yaml --cluster my-cluster.yaml --hellaswag hellaswag_val.jsonl
"""


@main.command("train", epilog=_TRAIN_EXAMPLES)
@click.option(
    "--config", type=click.Path(path_type=Path), required=True, help="A config, such as a search's optimal.yaml."
)
@click.option("--cluster", help="A Slurm profile, or the path of one, to train there as a job.  [default: here]")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Directory of this training.  [default: training beside the config]",
)
@click.option("--resume", is_flag=True, help="Go on from its newest checkpoint; start it where there is none.")
@click.option(
    "--data", metavar="PREFIX|TEXT", help="A .bin/.idx set without its ending, or a text.  [default: the config's]"
)
@click.option("--validate-every", type=int, metavar="STEPS", help="[default: trainer.val_check_interval]")
@click.option(
    "--checkpoint-every",
    type=int,
    metavar="STEPS",
    help="Also at the end, and when it is to stop.  [default: exp_manager's every_n_train_steps, or as validation]",
)
@click.option(
    "--keep-checkpoints", type=int, metavar="K", help="The newest ones.  [default: exp_manager's save_top_k, or 2]"
)
@click.option(
    "--sample-every", type=int, metavar="STEPS", help="Write a sample of text so often.  [default: at the end]"
)
@click.option("--prompt", help="What a sample of text begins with; without it and --sample-every there are none.")
@click.option("--sample-tokens", type=int, default=64, show_default=True, help="Length of a sample of text.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="Of its tokens; 0 takes the likeliest.")
@click.option(
    "--hellaswag",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Questions to score at the end: one a line, with ctx, endings and label.",
)
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    help="Where parameters, tokens and loss go.  [default: runs.csv in RESULTS]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train_command(as_json: bool, **options: Any) -> None:  # noqa: FBT001 (click passes by name)
    """Train for real, from a config.

    Writes losses.csv, evaluations.jsonl, TensorBoard's scalars and checkpoints into the directory of the training.
    Ctrl-C writes a checkpoint first; a second one does not wait for it. KEY=VALUE overrides any key of the config.
    """
    _terminate_like_ctrl_c()
    try:
        from hptool import train  # noqa: PLC0415 (because --help should not wait for it)

        made = train.train(train.TrainRequest(**options), _say)
        if as_json:
            click.echo(json.dumps(made.document(), indent=2))
        else:
            for line in made.lines():
                click.echo(line)
    except HptoolError as error:
        _fail(error)
    except KeyboardInterrupt as interrupt:
        click.echo("hptool: interrupted; --resume goes on from the newest checkpoint", err=True)
        sys.exit(_SIGNALLED + (interrupt.args[0] if interrupt.args else signal.SIGINT))


@main.command("replay")
@click.argument("results", type=click.Path(path_type=Path), metavar="RESULTS.csv")
@click.option("--grid", "grid_id", metavar="ID", help="Play this grid only.")
@click.option(
    "--strategy",
    type=click.Choice(["adaptive", "ranked", "optuna", "random", "grid", "naive", "guided", "bisect"]),
    help="Which runs: what promises most after each run, by prediction, Optuna's TPE, by chance, nested loops, or "
    "least model parallelism first. For tables of serving guided, bisect, ranked or grid.  "
    "[default: ranked; serving: guided]",
)
@click.option(
    "--primary/--all", "primary_only", default=False, show_default=True, help="Grids whose grid_use is primary, or all."
)
@click.option("--max-tp", type=click.IntRange(min=1), help="Leave out rows of more tensor parallelism.")
@click.option("--max-nodes", type=click.IntRange(min=1), help="Leave out rows of more nodes.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the strategies random and optuna."
)
@click.option("-v", "--verbose", is_flag=True, help="Show every grid.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def replay_command(results: Path, verbose: bool, as_json: bool, **options: Any) -> None:  # noqa: FBT001 (click passes by name)
    """Play a search against recorded results.

    Rows of the CSV with the same grid_id are recorded runs of one model on one cluster. A strategy says which to run;
    each try costs one run, a failed one too. Says how many runs it takes until a layout within 2 % of the best was
    tried, and where the strategy stops by itself, after how many runs and how good the best of them is.

    A CSV with the columns batch, input_len and output_len has points of serving. Those of one series, model, GPU,
    engine and lengths are a grid, in which the best within several limits and the frontier are searched.
    """
    try:
        # Here and not above, because pandas takes a second that --help should not cost.
        from rich.console import Console  # noqa: PLC0415

        from hptool import replay  # noqa: PLC0415

        made = replay.replay_table(results, say=_say, **options)
        if as_json:
            click.echo(json.dumps(replay.as_json(made), indent=2))
        else:
            each_grid = verbose or options["grid_id"] is not None
            replay.print_replay(made, Console(highlight=False), each_grid=each_grid)
    except HptoolError as error:
        _fail(error)


_CALIBRATE_EXAMPLES = """\b
Examples:
  hptool calibrate
  hptool calibrate --cluster my-cluster.yaml --nodes 2
  hptool calibrate --peak-tflops bf16=362 --output my-gpu.yaml
"""


@main.command("calibrate", epilog=_CALIBRATE_EXAMPLES)
@click.option("--cluster", help="A profile, or the path of one: measure by one job there.  [default: this machine]")
@click.option(
    "--nodes", type=int, help="Nodes of the job; across two, their links are measured too.  [default: 2 or 1]"
)
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), help="What to measure.  [default: CUDA where there is any]"
)
@click.option(
    "--peak-tflops",
    multiple=True,
    metavar="PRECISION=TFLOPS",
    help="Dense peak of the data sheet, such as bf16=989.4; for a GPU that hptool does not know.",
)
@click.option(
    "--max-minutes", type=float, default=3.0, show_default=True, help="Time for it, once the job runs; more is better."
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Where the facts go.  [default: cluster/gpus/GPU.yaml, from here]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def calibrate_command(as_json: bool, **options: Any) -> None:  # noqa: FBT001 (click passes by name)
    """Measure the GPUs that you have, for predictions of your own.

    Times GEMMs, attention, layers, the host and the links between GPUs, fits the curves that predictions use, writes
    them as the facts of the GPU, and says where they differ from those in use. Run from the same directory, hptool
    takes facts in cluster/gpus before its own.
    """
    _terminate_like_ctrl_c()
    try:
        from rich.console import Console  # noqa: PLC0415 (because --help should not wait for them)

        from hptool import calibrate  # noqa: PLC0415

        with _progress(Console(stderr=True, highlight=False)) as show:
            made = calibrate.calibrate(calibrate.CalibrateRequest(**options), _say, show)
        if as_json:
            click.echo(json.dumps(made.document(), indent=2))
        else:
            made.show(Console(highlight=False))
    except HptoolError as error:
        _fail(error)
    except KeyboardInterrupt as interrupt:
        click.echo("hptool: interrupted; nothing was written", err=True)
        sys.exit(_SIGNALLED + (interrupt.args[0] if interrupt.args else signal.SIGINT))


@contextlib.contextmanager
def _progress(console: Any) -> Iterator[Callable[[str], None]]:
    """What shows how far something is: in one line that changes, or as a line every few seconds."""
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
        return
    told = -_TELL_S

    def show(text: str) -> None:
        nonlocal told
        if time.monotonic() - told >= _TELL_S:
            told = time.monotonic()
            _say(text)

    yield show


def _say(message: str) -> None:
    click.echo(f"hptool: {message}", err=True)


def _fail(error: HptoolError) -> NoReturn:
    for line in str(error).splitlines():
        click.echo(f"hptool: error: {line}", err=True)
    sys.exit(error.exit_code)


def _terminate_like_ctrl_c() -> None:
    """SIGTERM and SIGHUP clean up as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        raise KeyboardInterrupt(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            signal.signal(number, interrupt)
