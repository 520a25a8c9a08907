"""The command line: `fastvkd demo|train|eval|compare|attack|steer|plan|export|data|env`. What a user can mend is one
line and exit code 2."""

import argparse
import dataclasses
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvkd import __version__
from fastvkd.errors import FastVKDError, disk_is_full


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 where a certificate says `failed`, 2 for what the user can mend."""
    # OpenMP threads that wait by spinning take the core from the thread they wait for as soon as something else runs on
    # the machine: measured 24 times slower on two busy cores. libgomp reads this when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.basicConfig(level=logging.WARNING, format="fastvkd: %(message)s")
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except FastVKDError as error:
        print(f"fastvkd: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if disk_is_full(error):
            mend = "no space left on disk; free some or write elsewhere"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            mend = f"{error.strerror}; give a folder that can be read and written"
        else:
            raise
        print(f"fastvkd: error: {error.filename or 'output'}: {mend}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvkd", description="Visual Knowledge Distillation: unlearning for multimodal LLMs"
    )
    parser.add_argument("--version", action="version", version=f"fastvkd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="watch a small LLaVA forget faces, from drawing them to the report")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the report (default: %(default)s)")
    demo.add_argument("--size", default="default", help="default or tiny")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--gold", action="store_true", help="also train a model that never saw the forgotten people")
    demo.add_argument("--cache", type=Path, help="folder of trained demo models (default: ~/.cache/fastvkd)")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the unlearning run")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="make a model forget")
    add_train_arguments(train)
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser(
        "eval", help="measure what a model knows of the forget, test, retain and real-world sets"
    )
    evaluate.add_argument("--model", required=True, metavar="FOLDER")
    evaluate.add_argument("--data", required=True, metavar="DATA", help="folder, or hub id of a data set")
    evaluate.add_argument("--benchmark", help="mllmu, clear, umu or jsonl (default: recognised)")
    evaluate.add_argument("--forget-split", help="default: the one that an exported model forgot, or forget_5")
    evaluate.add_argument("--retain-split", help="default: the one that it kept, or retain_95")
    evaluate.add_argument("--mode", default="corrected", help="corrected (default) or paper")
    evaluate.add_argument("--batch-size", type=int, default=32)
    evaluate.add_argument("--max-samples", type=int, help="at most so many questions a cell and task")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument(
        "--reference-eval",
        type=Path,
        metavar="FOLDER",
        help="--out of a model that never saw the forget set, to measure the distance from it",
    )
    evaluate.add_argument("--steering", type=Path, metavar="FILE", help="what `fastvkd steer` wrote, switched on")
    evaluate.add_argument("--local-files-only", action="store_true", help="take a hub id from the cache only")
    evaluate.add_argument("--device", default="auto")
    evaluate.add_argument("--bf16", action="store_true")
    evaluate.add_argument("--out", type=Path, default=Path("out/eval"), help="folder of results.json and samples.jsonl")
    evaluate.set_defaults(run=_eval)

    compare = commands.add_parser("compare", help="one table over several runs of eval and demo")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--out folder of a run")
    compare.add_argument("--format", default="text", help="text (default), json or latex")
    compare.set_defaults(run=_compare)

    attack = commands.add_parser("attack", help="try to bring the knowledge back, and certify the result")
    attack.add_argument("--model", required=True, metavar="FOLDER", help="the unlearned model")
    attack.add_argument("--before", metavar="FOLDER", help="the model before unlearning, to compare with")
    attack.add_argument("--gold", metavar="FOLDER", help="a model that never saw the forget set, the yardstick")
    attack.add_argument("--steering", type=Path, metavar="FILE", help="of `fastvkd steer`, switched on in --model")
    attack.add_argument("--data", required=True, metavar="DATA", help="folder, or hub id of a data set")
    attack.add_argument("--forget-split", help="default: the one that the exported model forgot, or forget_5")
    attack.add_argument("--retain-split", help="default: the one that it kept, or retain_95")
    attack.add_argument(
        "--kind",
        nargs="+",
        default=["all"],
        help="relearn, paraphrase, fewshot, reverse, quantize, images, membership, probe (default: all)",
    )
    attack.add_argument("--config", type=Path, metavar="YAML", help="other `certificate` thresholds than the run's")
    attack.add_argument("--max-samples", type=int, default=400, help="questions a variant (default: %(default)s)")
    attack.add_argument("--batch-size", type=int, default=64, help="questions at once (default: %(default)s)")
    attack.add_argument("--shares", type=float, nargs="+", help="relearning: shares of the forget photos")
    attack.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="relearning: seeds")
    attack.add_argument("--steps", type=int, nargs="+", help="relearning: after which steps to measure")
    attack.add_argument("--learning-rate", type=float, default=1e-3, help="relearning (default: %(default)s)")
    attack.add_argument("--seed", type=int, default=0)
    attack.add_argument("--device", default="auto")
    attack.add_argument("--bf16", action="store_true")
    attack.add_argument("--out", type=Path, default=Path("out/attack"), help="folder of attacks.json, certificate.json")
    attack.set_defaults(run=_attack)

    steer = commands.add_parser("steer", help="find a direction that suppresses at test time, without training")
    steer.add_argument("--model", required=True, metavar="FOLDER")
    steer.add_argument("--data", required=True, metavar="DATA", help="folder, or hub id of a data set")
    steer.add_argument("--forget-split", default="forget_5")
    steer.add_argument("--retain-split", default="retain_95")
    steer.add_argument("--layers", type=int, nargs="+", required=True, help="LLM layers to steer, the first being 0")
    steer.add_argument("--strength", type=float, default=1.0, help="multiple of the direction (default: %(default)s)")
    steer.add_argument("--questions", type=int, default=256, help="of each side (default: %(default)s)")
    steer.add_argument("--batch-size", type=int, default=16, help="questions at once (default: %(default)s)")
    steer.add_argument("--seed", type=int, default=0)
    steer.add_argument("--device", default="auto")
    steer.add_argument("--bf16", action="store_true")
    steer.add_argument("--out", type=Path, default=Path("out/steering.safetensors"), help="file (default: %(default)s)")
    steer.set_defaults(run=_steer)

    plan = commands.add_parser("plan", help="FLOPs and memory of a run before anything is loaded")
    plan.add_argument("--config", type=Path, metavar="YAML")
    plan.add_argument("--gpu", help='a card, for example "RTX 4090"')
    plan.add_argument("--memory", help="or its memory, for example 24GiB")
    plan.add_argument("--world-size", type=int, default=1, metavar="N", help="number of GPUs")
    plan.add_argument("--json", action="store_true")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.set_defaults(run=_plan)

    export = commands.add_parser("export", help="write the trained model as an ordinary model folder")
    export.add_argument(
        "--run", dest="run_folder", type=Path, required=True, metavar="FOLDER", help="a run's output_dir"
    )
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder")
    export.add_argument("--base", type=Path, help="the base model's folder, if it moved since")
    export.set_defaults(run=_export)

    data = commands.add_parser("data", help="look at data before training on it")
    data_commands = data.add_subparsers(required=True, metavar="COMMAND")
    check = data_commands.add_parser("check", help="validate every row of a data folder")
    check.add_argument("path", metavar="DATA", help="folder, or hub id of a data set")
    check.add_argument("--model", metavar="FOLDER", help="also check training labels, with this model's processor")
    check.add_argument("--local-files-only", action="store_true", help="take a hub id from the cache only")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.set_defaults(run=_data_check)

    env = commands.add_parser("env", help="versions, devices and what is optional, for a bug report")
    env.set_defaults(run=_env)
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastvkd train`, which `fastvkd/train.py` under the DeepSpeed launcher shares."""
    parser.add_argument("--config", type=Path, metavar="YAML", help="settings; see configs/")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the YAML's")


def run_train(arguments: argparse.Namespace) -> int:
    from fastvkd.progress import Progress
    from fastvkd.settings import load_settings

    settings = load_settings(arguments.config, arguments.overrides)
    from fastvkd.unlearning.loop import unlearn  # late: a wrong setting should not wait for torch

    quiet = int(os.environ.get("RANK", "0")) != 0
    bars: dict[str, Progress] = {}

    def show(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
        if quiet:
            return
        bar = bars.setdefault(phase, Progress({"teacher": "Teacher features", "unlearn": "Unlearning"}[phase]))
        bar(
            done,
            total,
            " ".join(f"{k} {v:.4g}" for k, v in figures.items() if k.startswith("loss") or k == "grad_norm"),
        )

    try:
        result = unlearn(settings, progress=show)
    finally:
        if settings.engine == "deepspeed":
            from fastvkd.engines.deepspeed_engine import leave_deepspeed

            leave_deepspeed()
    if not quiet:
        print(
            f"{result.steps} steps, {result.images_seen} images in {result.seconds['unlearn']:.1f} s; "
            f"{result.trainable_parameters:,} of {result.trainable_parameters + result.frozen_parameters:,} loaded "
            f"parameters trainable ({result.trained_share:.1%} of them free to move); checkpoint: {result.checkpoint}"
        )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from fastvkd.demo.run import demo
    from fastvkd.reporting.report import criteria, headline_sentence

    report = demo(
        arguments.out,
        size=arguments.size,
        seed=arguments.seed,
        gold=arguments.gold,
        cache=arguments.cache,
        overrides=arguments.overrides,
    )
    print(headline_sentence(report))
    for criterion in criteria(report):
        mark = "met   " if criterion.met else "MISSED"
        print(f"  {mark} {criterion.name}: {criterion.found} (asked: {criterion.asked})")
    print(f"Report: {arguments.out / 'report.html'}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from fastvkd.evaluation.comparison import read_runs, table
    from fastvkd.evaluation.run import SAMPLES, evaluate
    from fastvkd.progress import Progress
    from fastvkd.reporting.report import write_atomically

    with Progress("Evaluating") as bar:
        results = evaluate(
            arguments.model,
            arguments.data,
            benchmark=arguments.benchmark,
            forget_split=arguments.forget_split,
            retain_split=arguments.retain_split,
            mode=arguments.mode,
            batch_size=arguments.batch_size,
            max_samples=arguments.max_samples,
            seed=arguments.seed,
            log_path=arguments.out / SAMPLES,
            reference_eval=arguments.reference_eval,
            steering=arguments.steering,
            device=arguments.device,
            bf16=arguments.bf16,
            local_files_only=arguments.local_files_only,
            progress=bar,
        )
    write_atomically(arguments.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(f"{results['benchmark']}, {results['mode']} mode")
    print(table(read_runs([arguments.out]), "text"))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from fastvkd.evaluation.comparison import read_runs, table

    print(table(read_runs(arguments.runs), arguments.format))
    return 0


def _attack(arguments: argparse.Namespace) -> int:
    from fastvkd.settings import load_settings

    thresholds = None
    if arguments.config is not None:
        thresholds = load_settings(
            arguments.config, {"model_name_or_path": arguments.model, "data": arguments.data}
        ).certificate
    from fastvkd.attacks.run import Budget, attack_run, table
    from fastvkd.progress import Progress

    defaults = Budget()
    budget = Budget(
        max_samples=arguments.max_samples,
        batch_size=arguments.batch_size,
        relearning_shares=tuple(arguments.shares or defaults.relearning_shares),
        relearning_steps=tuple(arguments.steps or defaults.relearning_steps),
        relearning_seeds=tuple(arguments.seeds),
        relearning_samples=arguments.max_samples,
        learning_rate=arguments.learning_rate,
    )
    folders = {"vanilla": arguments.before, "unlearned": arguments.model, "gold": arguments.gold}
    with Progress("Attacking") as bar:
        found = attack_run(
            {name: folder for name, folder in folders.items() if folder},
            arguments.data,
            forget_split=arguments.forget_split,
            retain_split=arguments.retain_split,
            kinds=arguments.kind,
            budget=budget,
            thresholds=thresholds,
            steering=arguments.steering,
            seed=arguments.seed,
            device=arguments.device,
            bf16=arguments.bf16,
            out=arguments.out,
            progress=bar,
        )
    print(table(found))
    verdict = found["certificate"]["verdict"]
    print(f"Certificate: {verdict}; {arguments.out / 'certificate.json'}")
    return 1 if verdict == "failed" else 0


def _steer(arguments: argparse.Namespace) -> int:
    from fastvkd.unlearning.methods.steering import fit_to_folder

    steering = fit_to_folder(
        arguments.model,
        arguments.data,
        forget_split=arguments.forget_split,
        retain_split=arguments.retain_split,
        layers=arguments.layers,
        strength=arguments.strength,
        questions=arguments.questions,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=arguments.device,
        bf16=arguments.bf16,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    steering.save(arguments.out)
    print(f"{arguments.out}: layers {', '.join(map(str, steering.directions))}; no weight was changed")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from fastvkd.planning import plan
    from fastvkd.settings import load_settings

    settings = load_settings(arguments.config, arguments.overrides)
    result = plan(settings, gpu=arguments.gpu, memory=arguments.memory, world_size=arguments.world_size)
    print(json.dumps(result.to_dict(), indent=1) if arguments.json else result.table())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from fastvkd.exporting import export
    from fastvkd.reporting.model_card import run_card

    done = export(arguments.run_folder, arguments.to, model_card=run_card(arguments.run_folder), base=arguments.base)
    print(
        f"{done.folder}: {done.tensors} tensors replaced in {len(done.rewritten_shards)} shard(s), "
        f"{len(done.copied_shards)} shard(s) copied untouched" + (" (blocks shared)" if done.reflinked else "")
    )
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from fastvkd.data.check import check_data
    from fastvkd.progress import Progress

    with Progress("Checking") as bar:
        report = check_data(arguments.path, bar, model=arguments.model, local_files_only=arguments.local_files_only)
    print(json.dumps(dataclasses.asdict(report), indent=1) if arguments.json else "\n".join(report.lines()))
    return 0 if report.ok else 2


def _env(arguments: argparse.Namespace) -> int:
    from fastvkd.environment import describe

    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
