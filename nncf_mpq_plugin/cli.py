"""The ``nncf-mpq`` command: the only place that prints and sets exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nncf_mpq_plugin import tables
from nncf_mpq_plugin.comparison import METHODS, policy_by_name
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError, InterruptedRun, MPQError, VerificationError
from nncf_mpq_plugin.memory import keep_freed_memory
from nncf_mpq_plugin.search_options import Request, add_search_options, asks_for_another_search, limit_of, request_of
from nncf_mpq_plugin.types import BUDGETS, Budget, ImportanceTable, Policy, read_json, write_json

if TYPE_CHECKING:
    from nncf_mpq_plugin.pipeline import Pipeline

EPILOG = """examples:
  nncf-mpq run configs/digits_resnet.json                everything
  nncf-mpq search runs/digits_resnet --bitops-ratio 0.1  another budget
  nncf-mpq COMMAND --help                                what it takes

exit codes:
  0 done                         3 no policy meets the budget
  1 unexpected failure           4 exported and trained model do not agree
  2 bad input or config        130 interrupted; the same command goes on
"""
SHARED = ("run", "train-importance", "finetune")  # what several processes can do together
RUN_HELP = "a config file, or the folder of a run that was begun"


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    :param arguments: default: those of the process.
    :return: the exit code.
    """
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    out, err = Console(soft_wrap=True, quiet=not _prints()), Console(stderr=True, soft_wrap=True)
    try:
        if _together() and getattr(options, "command", "") not in SHARED:
            msg = f"Under torchrun the commands are {', '.join(SHARED)}; run the others without it."
            raise InputError(msg)
        result = options.function(options, out)
        if getattr(options, "json", False) and _prints():
            print(json.dumps(result, indent=1, allow_nan=False), flush=True)
    except MPQError as error:
        if getattr(options, "json", False) and _prints():
            print(json.dumps(_failure(error)))
        process = "" if _prints() else f"process {os.environ['RANK']}: "
        err.print(f"{process}error: {error}", style="red", markup=False, highlight=False)
        return error.exit_code
    except KeyboardInterrupt:
        err.print("Interrupted. The same command goes on from the last saved state.", style="yellow")
        return InterruptedRun.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
        return 1
    except Exception as error:
        traceback.print_exc()
        err.print(f"error: {type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        err.print("This was not foreseen. What was done so far is kept; the same command goes on from there.")
        return 1
    return 0


def _together() -> bool:
    """:return: whether torchrun has started several processes of this command."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _prints() -> bool:
    """:return: false in all processes but the first of those that torchrun starts."""
    return not _together() or os.environ["RANK"] == "0"


def _failure(error: MPQError) -> dict[str, Any]:
    if isinstance(error, InfeasibleBudgetError):
        known = {"budget": error.budget, "requested": error.requested, "achievable": error.achievable}
        return {"status": "infeasible", **known, "message": str(error)}
    report = {"report": error.report} if isinstance(error, VerificationError) else {}
    return {"status": "error", "error": type(error).__name__, "message": str(error), **report}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nncf-mpq",
        description="Mixed-precision quantization by learned layer importance, for NNCF and OpenVINO.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: Any, description: str, *, run: str = "", json_help: str = "") -> Any:
        added = commands.add_parser(name, help=description, description=description)
        added.set_defaults(function=function, command=name)
        if run:
            added.add_argument("run", metavar="CONFIG" if name in ("run", "train-importance") else "RUN", help=run)
            added.add_argument(
                "--allow-code",
                action="store_true",
                help="import models and data loaders that the config names outside torchvision and this package; "
                "that runs their code",
            )
        if json_help:
            added.add_argument("--json", action="store_true", help=json_help)
        return added

    summary = "print the summary as one JSON object on stdout"
    for name, function, description, json_help in (
        (
            "run",
            _run,
            "All stages from a config to verified OpenVINO and ONNX files; goes on where it stopped.",
            summary,
        ),
        ("train-importance", _train_importance, "Train (or load) the model and its importance table.", ""),
    ):
        added = command(name, function, description, run=RUN_HELP, json_help=json_help)
        added.add_argument("--output", metavar="DIR", help="the run's folder (default: runs/NAME_OF_THE_CONFIG)")
        added.add_argument("--restart", action="store_true", help="remove what an earlier run left in the folder")
    _add_searches(command)
    added = command("finetune", _finetune, "Fine-tune at the policy's bits and freeze.", run=RUN_HELP)
    added.add_argument("--policy", metavar="FILE", help="use this policy (edited by hand, say) in place of the run's")
    command("export", _export, "Write the ONNX file and the OpenVINO IR.", run=RUN_HELP)
    description = "Compare the exported files with the trained model; exit code 4 if they do not agree."
    added = command("verify", _verify, description, run=RUN_HELP, json_help="print the report (verify.json)")
    added.add_argument(
        "--model", metavar="FILE", help="compare this exported file (.xml or .onnx) in place of the run's, which stay"
    )
    description = "Latency, kernels, sizes, load time and memory beside FP32 and INT8."
    added = command("benchmark", _benchmark, description, run=RUN_HELP, json_help="print benchmark.json")
    added.add_argument("--seconds", type=float, default=3.0, metavar="N", help="measuring time of each model (3)")
    added.add_argument("--threads", type=int, default=2, metavar="N", help="threads of each inference (2)")
    description = "Measure each layer's time in INT8 and in floating point, for search --latency-ratio (latency.json)."
    added = command("latency", _latency, description, run=RUN_HELP, json_help="print latency.json")
    added.add_argument("--seconds", type=float, default=3.0, metavar="N", help="measuring time of each model (3)")
    added.add_argument("--threads", type=int, default=2, metavar="N", help="threads of each inference (2)")
    description = "How settled the learned scales of a run are, and whether another run (seed) orders them alike."
    added = command("stability", _stability, description, json_help="print the figures and every curve")
    added.add_argument("run", metavar="RUN", help="the folder of a run whose joint training is done")
    added.add_argument("--other", metavar="RUN", help="the folder of the same run with another seed")
    description = "Write report.html, one page that shows the run as far as it has come."
    command("report", _report, description).add_argument("run", metavar="RUN", help="the folder of a run")
    description = "Check a config, or print what it may hold."
    added = commands.add_parser("config", help=description, description=description)
    actions = added.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, function, text in (
        ("check", _config_check, "Validate a config file; what is wrong is listed with the nearest valid choice."),
        ("schema", _config_schema, "Print the JSON Schema, for editors."),
        ("docs", _config_docs, "Print the reference of all keys, as Markdown."),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(function=function)
        if name == "check":
            action.add_argument("file", metavar="FILE", help="the config, as nncf-mpq run takes it")
            action.add_argument(
                "--allow-code", action="store_true", help="also import the callables that the config names"
            )
    return parser


def _add_searches(command: Callable[..., Any]) -> None:
    one = "print one JSON object"
    added = command("search", _search, "Find the best policy within budgets.", json_help=one)
    add_search_options(added)
    added.add_argument("--gap", type=float, metavar="N", help="relative gap to the optimum that is good enough (1e-9)")
    added.add_argument("--time-limit", type=float, metavar="S", help="take the best policy found within S seconds")
    added.add_argument(
        "--method",
        choices=METHODS,
        default="learned",
        metavar="NAME",
        help=f"a policy to compare with, within the same budgets (default: learned): {', '.join(METHODS)}",
    )
    added.add_argument("--seed", type=int, default=0, metavar="N", help="of the methods random and shuffled (0)")
    added.add_argument(
        "--refine-seconds",
        type=float,
        metavar="S",
        help="for a run: improve the answer for S seconds by measuring policies in its jointly trained model",
    )
    added.add_argument("--allow-code", action="store_true", help="with --refine-seconds: as for run")
    added.add_argument("--output", metavar="FILE", help="write the policy to this file")
    description = "Find the best policy at each of many values of one budget."
    added = command("pareto", _pareto, description, json_help=f"{one}, with every policy")
    add_search_options(added)
    added.add_argument(
        "--vary",
        choices=BUDGETS,
        default="bitops_ratio",
        metavar="BUDGET",
        help=f"the budget (default: bitops_ratio): {', '.join(BUDGETS)}",
    )
    added.add_argument("--points", type=int, default=100, metavar="N", help="how many (100)")
    added.add_argument("--output", metavar="FILE", help="write all policies to this file (JSON)")
    added.add_argument("--draw", metavar="FILE", help="draw objective over budget; the suffix gives the format")
    description = "Tell which budgets bind, and what each layer's next bit up or down would cost and gain."
    add_search_options(command("explain", _explain, description, json_help=one))
    description = "Find the best policy if layers were pinned elsewhere, and what that would cost."
    added = command("what-if", _what_if, description, json_help=one)
    add_search_options(added)
    added.add_argument("pinned", metavar="LAYERS[:TENSOR]=BITS", help="the pin, such as 'layer1.*:weight=4'")


def _run(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    with _pipeline(options, out) as pipeline:
        summary = pipeline.run()
    out = _quiet_for_json(options, out)
    out.print(tables.policy_table(summary["layers"]))
    out.print(tables.results_table(summary["results"]))
    out.print(tables.verification_table(summary["verification"]))
    out.print(f"Everything is in {pipeline.folder.path}; deploy {pipeline.folder.file('deploy')}", highlight=False)
    return summary


def _train_importance(options: argparse.Namespace, out: Console) -> None:
    with _pipeline(options, out) as pipeline:
        pipeline.run_stage("float")
        pipeline.run_stage("importance")
    out.print(f"The importance table is {pipeline.folder.file('importance.json')}", highlight=False)


def _search(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    from nncf_mpq_plugin.summary import layer_rows, totals

    if Path(options.table).is_dir() and not _wants_other_search(options):
        options.run = options.table
        with _pipeline(options, out) as pipeline:
            pipeline.run_stage("search")
        table = ImportanceTable.load(pipeline.folder.file("importance.json"))
        policy = Policy.load(pipeline.folder.file("policy.json"))
    else:
        table, policy = _search_anew(options, out)
    if options.output:
        policy.save(options.output)
    report = policy.to_json()
    out = _quiet_for_json(options, out)
    out.print(tables.policy_table(layer_rows(table, policy)))
    for line in tables.search_lines(report, totals(table, policy)):
        out.print(line, highlight=False, markup=False)
    return report


def _wants_other_search(options: argparse.Namespace) -> bool:
    others = (options.refine_seconds, options.gap, options.time_limit)
    other_method = options.method != "learned"
    return asks_for_another_search(options) or other_method or any(value is not None for value in others)


def _search_anew(options: argparse.Namespace, out: Console) -> tuple[ImportanceTable, Policy]:
    from nncf_mpq_plugin.allocation import search

    request = request_of(options)
    budget = request.with_budget()
    if options.method != "learned":
        return request.table, _by_method(options, request, budget)
    if options.refine_seconds is None:
        gap = {} if options.gap is None else {"gap": options.gap}
        found = search(request.table, budget, **request.arguments, **gap, time_limit=options.time_limit)
        return request.table, found.policy
    if not Path(options.table).is_dir():
        msg = f"--refine-seconds needs a run's folder, whose jointly trained model it asks; {options.table} is a file."
        raise InputError(msg)
    options.run = options.table
    with _pipeline(options, out) as pipeline:
        samples = pipeline.folder.config.refine["samples"]
        limits = {"evaluations": None, "seconds": options.refine_seconds, "samples": samples}
        refinement = pipeline.refined(request.table, request.arguments, budget=budget, **limits)
    return request.table, refinement.solution.policy


def _by_method(options: argparse.Namespace, request: Request, budget: Budget) -> Policy:
    arguments = dict(request.arguments)
    limits, weight_only = arguments.pop("constraints"), arguments.pop("weight_only")
    if limits or weight_only:
        msg = f"--method {options.method} takes no limits on single layers and no --weight-only."
        raise InputError(msg)
    return policy_by_name(options.method, request.table, budget, seed=options.seed, **arguments)


def _pareto(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    from nncf_mpq_plugin.allocation import draw, pareto

    request = request_of(options)
    sweep = pareto(request.table, options.vary, request.budget, points=options.points, **request.arguments)
    if options.output:
        sweep.save(options.output)
    if options.draw:
        draw(sweep, options.draw)
    _quiet_for_json(options, out).print(tables.sweep_table(sweep.to_json()))
    return sweep.to_json()


def _explain(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    from nncf_mpq_plugin.allocation import explain

    request = request_of(options)
    report = explain(request.table, request.with_budget(), **request.arguments).to_json()
    out = _quiet_for_json(options, out)
    out.print(tables.binding_table(report))
    out.print(tables.steps_table(report))
    return report


def _what_if(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    from nncf_mpq_plugin.allocation import what_if

    request = request_of(options)
    pin = limit_of(options.pinned, "pinned")
    report = what_if(request.table, request.with_budget(), pin, **request.arguments).to_json()
    _quiet_for_json(options, out).print(tables.what_if_table(report))
    return report


def _finetune(options: argparse.Namespace, out: Console) -> None:
    from nncf_mpq_plugin import distributed

    with _pipeline(options, out) as pipeline:
        if options.policy:
            policy = Policy.load(options.policy)
            pipeline.run_stage("search")  # once it is done, a later run keeps the given policy
            pipeline.check_policy(policy, options.policy)
            distributed.on_main(lambda: policy.save(pipeline.folder.file("policy.json")))
        pipeline.run_stage("finetune")
        pipeline.run_stage("uniform")
    metrics = read_json(pipeline.folder.file("model/metrics.json"))
    accuracy = "-" if metrics["accuracy"] is None else f"{metrics['accuracy']:.2%}"
    out.print(f"Accuracy {accuracy}; the model is in {pipeline.folder.file('model')}", highlight=False)


def _export(options: argparse.Namespace, out: Console) -> None:
    with _pipeline(options, out) as pipeline:
        pipeline.run_stage("export")
    out.print(f"The files are in {pipeline.folder.file('deploy')}", highlight=False)


def _verify(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    with _pipeline(options, out) as pipeline:
        report = pipeline.agreement(options.model) if options.model else None
        if report is None:
            pipeline.folder.forget("verify")
            pipeline.run_stage("verify")
    value: dict[str, Any] = report.to_json() if report else read_json(pipeline.folder.file("verify.json"))
    _quiet_for_json(options, out).print(tables.verification_table(value))
    if report:
        report.check(export="nncf-mpq export")
    return value


def _benchmark(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    from nncf_mpq_plugin import deploy

    _check_measurement(options)
    with _pipeline(options, out) as pipeline:
        folder = pipeline.folder
        policy = Policy.load(folder.file("policy.json")).all_layers
        report = deploy.benchmark(
            pipeline.float_model(),
            pipeline.frozen_model(),
            folder.file("deploy"),
            pipeline.calibration(),
            {name: (bits.weight, bits.activation) for name, bits in policy.items()},
            seconds=options.seconds,
            threads=options.threads,
        ).to_json()
    write_json(folder.file("benchmark.json"), report)
    out = _quiet_for_json(options, out)
    out.print(tables.benchmark_table(report))
    out.print(tables.kernel_table(report))
    for name, reason in report["left_out"].items():
        out.print(f"{name}: could not be made ({reason})", highlight=False, markup=False)
    return report


def _latency(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    from nncf_mpq_plugin import deploy

    _check_measurement(options)
    with _pipeline(options, out) as pipeline:
        layers = [layer.cost.name for layer in ImportanceTable.load(pipeline.folder.file("importance.json")).layers]
        table = deploy.measure_latency(
            pipeline.float_model(),
            pipeline.calibration(),
            layers,
            seconds=options.seconds,
            threads=options.threads,
        )
        file = pipeline.folder.file("latency.json")
        table.save(file)
    out = _quiet_for_json(options, out)
    out.print(tables.latency_table(table))
    out.print(f"{file}: for --latency-table, or compression.initializer.precision.search.latency_table.")
    return table.to_json()


def _check_measurement(options: argparse.Namespace) -> None:
    if options.threads < 1 or not options.seconds > 0:
        msg = f"--threads has to be at least 1 and --seconds above 0, got {options.threads} and {options.seconds}."
        raise InputError(msg)


def _stability(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    from nncf_mpq_plugin.stability import indicators_at, rank_agreement, stability

    def trained(run: str) -> dict[str, Any]:
        path = Path(run) / "joint" / "history.json"
        if not path.exists():
            msg = f"{path}: there is no such file. Train first: nncf-mpq train-importance {run}"
            raise InputError(msg)
        value: dict[str, Any] = read_json(path)
        return value

    value = trained(options.run)
    history = value["history"]
    if len(history["steps"]) < 2:
        msg = f"{options.run}: joint training has taken no step, so there is no order to look at."
        raise InputError(msg)
    report = stability(history["steps"], history["scales"], value.get("steps_per_epoch", 0))
    agreements = {} if report.first_epoch is None else {"first epoch": report.first_epoch.to_json()}
    if options.other:
        others = indicators_at(trained(options.other)["history"]["scales"])
        agreements["other run"] = rank_agreement(indicators_at(history["scales"]), others).to_json()
    out = _quiet_for_json(options, out)
    if agreements:
        out.print(tables.agreement_table(agreements))
    out.print(
        f"Order within 0.95 of the final one from step {report.settled_at} of {report.steps[-1]} on; "
        f"{len(report.out_of_order)} of {report.indicators} indicators out of order"
        f"{': ' + ', '.join(report.out_of_order) if report.out_of_order else ''}; largest change in the last tenth "
        f"{report.change:.1%}",
        highlight=False,
    )
    return {"stability": report.to_json(), "agreement": agreements, "curves": history["scales"]}


def _report(options: argparse.Namespace, out: Console) -> None:
    from nncf_mpq_plugin.report import write_report

    out.print(f"The report is {write_report(options.run)}", highlight=False)


def _config_check(options: argparse.Namespace, out: Console) -> None:
    from nncf_mpq_plugin.config import Config
    from nncf_mpq_plugin.preflight import check_sources

    config = Config.load(options.file)
    if options.allow_code:
        sys.path.insert(0, os.getcwd())
    left_out = check_sources(config, allow_code=options.allow_code)
    budgets = json.dumps(config.budget.to_json())
    out.print(f"{options.file} is valid: {config.model} on {config.data.source}, budgets {budgets}", highlight=False)
    for name in left_out:
        out.print(f"Not looked at without --allow-code, which would run it: {name}", highlight=False, markup=False)


def _config_schema(options: argparse.Namespace, out: Console) -> None:
    from nncf_mpq_plugin.config_keys import SCHEMA
    from nncf_mpq_plugin.schema import json_schema

    draft = "https://json-schema.org/draft/2020-12/schema"
    print(json.dumps({"$schema": draft, "title": "nncf-mpq config", **json_schema(SCHEMA)}, indent=1))


def _config_docs(options: argparse.Namespace, out: Console) -> None:
    from nncf_mpq_plugin.config_keys import reference_page

    print(reference_page(), end="")


def _quiet_for_json(options: argparse.Namespace, out: Console) -> Console:
    return Console(quiet=True) if getattr(options, "json", False) else out


@contextlib.contextmanager
def _pipeline(options: argparse.Namespace, out: Console) -> Iterator[Pipeline]:
    """The pipeline of a config or run folder, with its progress drawn on stderr and foreign output in log.txt."""
    from nncf_mpq_plugin.config import Config
    from nncf_mpq_plugin.distributed import joined
    from nncf_mpq_plugin.progress import ProgressLines
    from nncf_mpq_plugin.runfolder import RunFolder, taken

    given = Path(options.run)
    restart, output = getattr(options, "restart", False), getattr(options, "output", None)
    config = None
    if given.is_dir():
        if output is not None:
            msg = f"{given} is a run's folder; --output goes with a config file."
            raise InputError(msg)
        path, config = given, RunFolder.open(given).config
    else:
        config, path = Config.load(given), Path(output or f"runs/{given.stem}")
    if options.allow_code:
        sys.path.insert(0, os.getcwd())
    with joined(config.device), taken(path, config, restart=restart) as folder:
        log_file = folder.file("log.txt") if _prints() else os.devnull
        with _progress() as (listen, progress), open(log_file, "a", encoding="utf-8") as log:
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # importing NNCF makes it speak
            from nncf_mpq_plugin.adapters.nncf3 import quiet
            from nncf_mpq_plugin.pipeline import Listener, Pipeline, sources_of

            def log_line(text: str) -> None:
                progress.console.print(text, highlight=False, markup=False)

            def progress_line(text: str) -> None:
                folder.log(text)
                if not progress.console.is_terminal:  # where no bar is drawn
                    log_line(text)

            lines = ProgressLines(progress_line)

            def advance(stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
                listen(stage, done, total, numbers)
                lines(stage, done, total, numbers)

            try:
                with contextlib.redirect_stdout(log), quiet():
                    sources = sources_of(config, allow_code=options.allow_code)
                    yield Pipeline(folder, sources, Listener(log_line, advance))
            except (InterruptedRun, KeyboardInterrupt) as error:
                folder.log(f"interrupted: {error}")
                flag = " --allow-code" if options.allow_code else ""
                processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
                program = (
                    "nncf-mpq" if processes == "1" else f"torchrun --nproc_per_node={processes} -m nncf_mpq_plugin"
                )
                msg = f"{error or 'Interrupted.'}\nGo on with: {program} {options.command} {path}{flag}"
                raise InterruptedRun(msg) from error
            except Exception as error:
                folder.log(f"{type(error).__name__}: {error}")
                raise


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Any, Progress]]:
    """:return: a function that draws one bar a stage, and the bars."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    tasks: dict[str, TaskID] = {}
    with Progress(
        *columns,
        TextColumn("{task.fields[numbers]}"),
        console=Console(stderr=True, quiet=not _prints()),
        transient=True,
    ) as progress:

        def listen(stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
            shown = f"loss {numbers['loss']:.3f}" if "loss" in numbers else ""
            if stage not in tasks:
                tasks[stage] = progress.add_task(f"  {stage}", total=total, completed=done, numbers=shown)
            progress.update(tasks[stage], completed=done, total=total, numbers=shown, visible=done < total)

        yield listen, progress
