"""The command line: `fastvkd demo|train|eval|ask|compare|attack|report|steer|plan|export|merge|requests|purge|...`.

What a user can mend is one line and exit code 2.

What each command can be told is a dataclass of `fastvkd.options`. Heavy imports stand in the commands, so that help and
a wrong option do not wait for torch.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from fastvkd import __version__
from fastvkd import options as opt
from fastvkd.errors import (
    AlreadyForgotten,
    FastVKDError,
    ModelError,
    SettingsError,
    Terminated,
    disk_is_full,
    gpu_memory_is_full,
    host_memory_is_full,
    printable,
)

if TYPE_CHECKING:
    from fastvkd.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 where a certificate says `failed`, 2 for what the user can mend."""
    # OpenMP threads that wait by spinning take the core from the thread they wait for as soon as something else runs on
    # the machine: measured 24 times slower on two busy cores. libgomp reads this when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.basicConfig(level=logging.WARNING, format="fastvkd: %(message)s")
    kind: type[opt.Options] = opt.Options
    mask = os.umask(0o077)  # whatever is written is its owner's alone
    try:
        with _ended_by_sigterm():
            given = vars(_parser().parse_args(argv))
            run, kind = given.pop("command")
            return run(kind(**given))
    except Terminated:
        print(
            "fastvkd: ended by SIGTERM; what was finished is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        return 128 + signal.SIGTERM
    except FastVKDError as error:
        print(f"fastvkd: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if disk_is_full(error):
            mend = "no space left on disk; free some or write elsewhere"
        elif error.errno in _OF_THE_PATH:
            mend = f"{error.strerror}; give a folder that can be read and written"
        else:
            raise
        print(f"fastvkd: error: {printable(str(error.filename or 'output'))}: {mend}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if host_memory_is_full(error):
            mend = "close what else runs, or look for a number in the input that is too large"
            print(f"fastvkd: error: the machine's memory is full: {mend}", file=sys.stderr)
            return 2
        if not gpu_memory_is_full(error):
            raise
        what = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
        tried = f" ({what[0][0].lower()}{what[0][1:]})" if what else ""
        print(f"fastvkd: error: the GPU's memory is full{tried}: {kind.when_gpu_is_full}", file=sys.stderr)
        return 2
    finally:
        os.umask(mask)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM closes what is open and says so; a training run has its own way, which saves first.

    The ranks of a launcher's job are left alone: one that waits for another in a library would not come to notice.
    """
    if threading.current_thread() is not threading.main_thread() or "WORLD_SIZE" in os.environ:
        yield
        return

    def end(*_: object) -> NoReturn:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# What the system says of a path that cannot be read or written, whatever is done to it.
_OF_THE_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastvkd", description="Visual Knowledge Distillation: unlearning for multimodal LLMs")
    parser.add_argument("--version", action="version", version=f"fastvkd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "demo", _demo, opt.DemoOptions)
    _add(commands, "train", _train, opt.TrainOptions)
    _add(commands, "eval", _eval, opt.EvalOptions)
    _add(commands, "ask", _ask, opt.AskOptions)
    _add(commands, "compare", _compare, opt.CompareOptions)
    _add(commands, "attack", _attack, opt.AttackOptions)
    _add(commands, "report", _report, opt.ReportOptions)
    _add(commands, "steer", _steer, opt.SteerOptions)
    _add(commands, "plan", _plan, opt.PlanOptions)
    _add(commands, "export", _export, opt.ExportOptions)
    _add(commands, "merge", _merge, opt.MergeOptions)
    _add(commands, "requests", _requests, opt.RequestsOptions)
    _add(commands, "purge", _purge, opt.PurgeOptions)
    data = commands.add_parser("data", help="Look at data before training on it.")
    _add(data.add_subparsers(required=True, metavar="COMMAND"), "check", _data_check, opt.CheckOptions)
    _add(commands, "env", _env, opt.EnvOptions)
    return parser


def _add(commands: Any, name: str, run: Any, kind: type[opt.Options]) -> None:
    """A command with an argument for every option of `kind`; `run` gets the options and returns the exit code."""
    parser = commands.add_parser(
        name,
        help=kind.__doc__,
        description=kind.__doc__,
        epilog=f"example: {kind.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the example stays on one line
    )
    parser.set_defaults(command=(run, kind))
    for option in sorted(opt.options_of(kind), key=lambda option: option.default is not dataclasses.MISSING):
        if option.flag is not None:
            _add_option(parser, option, option.flag)


def _add_option(parser: argparse.ArgumentParser, option: opt.Option, flag: opt.Flag) -> None:
    name = flag.name or "--" + option.name.replace("_", "-")
    required = option.default is dataclasses.MISSING
    told: dict[str, Any] = {"help": argparse.SUPPRESS if flag.hidden else _help(option, flag)}
    if not required:
        told["default"] = option.default
    if option.kind is bool:
        parser.add_argument(name, dest=option.name, action="store_true", **told)
        return
    told["type"] = str if typing.get_origin(option.kind) is Literal else option.kind
    told["metavar"] = flag.metavar or name.strip("-").replace("-", "_").upper()
    if flag.positional:
        parser.add_argument(option.name, nargs=("+" if required else "*") if option.many else None, **told)
    else:
        parser.add_argument(name, dest=option.name, required=required, nargs="+" if option.many else None, **told)


def _help(option: opt.Option, flag: opt.Flag) -> str:
    """The option's help with what is allowed and the default."""
    text, default = flag.help, option.default
    if typing.get_origin(option.kind) is Literal:
        *most, last = typing.get_args(option.kind)
        text += f": {', '.join(most)} or {last}"
    if default is None or default is False or default in ((), "") or default is dataclasses.MISSING:
        return text
    return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


_PHASES = {"teacher": "Teacher features", "unlearn": "Unlearning", "scrub": "Scrubbing the LLM"}


def _train(options: opt.TrainOptions) -> int:
    from fastvkd.settings import load_settings

    settings = load_settings(options.config, options.overrides)
    quiet = int(os.environ.get("RANK", "0")) != 0
    try:
        return _dry_run(settings) if options.dry_run else _unlearn(settings, quiet)
    except AlreadyForgotten as nothing_to_do:
        if not quiet:
            print(nothing_to_do)
        return 0


def _unlearn(settings: "Settings", quiet: bool) -> int:
    from fastvkd.progress import Progress
    from fastvkd.unlearning.loop import unlearn  # late: a wrong setting should not wait for torch

    bars: dict[str, Progress] = {}

    def show(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
        if quiet:
            return
        if phase == "rate":
            print(f"Learning rate {figures['trial_rate']:g}: held-out loss {figures['watched_loss']:.4g} after a trial")
            return
        bar = bars.setdefault(phase, Progress(_PHASES[phase]))
        kinds = ("loss", "grad_norm", "left", "drift")
        shown = {key: value for key, value in figures.items() if key.startswith(kinds)}
        bar(done, total, " ".join(f"{key} {value:.4g}" for key, value in shown.items()))

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
        if result.verdict is not None:
            print(f"{result.verdict[0].upper()}{result.verdict[1:]}")
        _print_report_command(settings.output_dir)
    return 0


def _dry_run(settings: "Settings") -> int:
    """Checks what a run needs and says what it would do: nothing is trained and nothing stays written."""
    from fastvkd.devices import pick_device
    from fastvkd.files import held
    from fastvkd.planning.room import room_for
    from fastvkd.unlearning.start import begin

    if os.environ.get("RANK", "0") != "0":
        return 0
    device = pick_device(settings.device)
    with held(Path(settings.output_dir), "output_dir"):
        start = begin(settings)
        lines = start.describe()
    lines += room_for(start.settings, device, start.photos + settings.auxiliary_images)
    print("\n".join([*lines, "dry run: nothing was trained or written; leave out --dry-run to start"]))
    return 0


def _demo(options: opt.DemoOptions) -> int:
    from fastvkd.demo.run import demo
    from fastvkd.files import held
    from fastvkd.reporting.verdict import criteria, headline_sentence

    with held(options.out, "--out"):
        report = demo(options)
    print(headline_sentence(report))
    for criterion in criteria(report):
        mark = "met   " if criterion.met else "MISSED"
        print(f"  {mark} {criterion.name}: {criterion.found} (asked: {criterion.asked})")
    print(f"Report: {options.out / 'report.html'}")
    return 0


def _eval(options: opt.EvalOptions) -> int:
    from fastvkd.evaluation.comparison import comparison_table, read_runs
    from fastvkd.evaluation.run import evaluate
    from fastvkd.progress import Progress
    from fastvkd.reporting.sentences import requests_sentence

    with Progress("Evaluating") as bar:
        results = evaluate(options, bar)
    if options.lmms is not None:
        print(comparison_table(read_runs([options.out]), "text"))
        return 0
    print(f"{results['benchmark']}, {results['mode']} mode")
    print(comparison_table(read_runs([options.out]), "text"))
    if said := requests_sentence(results):
        print(said)
    _print_report_command(options.out)
    return 0


def _ask(options: opt.AskOptions) -> int:
    from fastvkd.evaluation.ask import ask, serve

    if options.serve:
        serve(options)
        return 0
    found = ask(options)
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    else:
        print("\n".join(line for one in found for line in one.lines()))
    return 0


def _compare(options: opt.CompareOptions) -> int:
    from fastvkd.evaluation.comparison import comparison_table, read_runs

    if options.paired:
        from fastvkd.evaluation.pairing import never_learnt, paired_table, paired_tests, read_samples

        base, *others = [(str(folder), read_samples(folder)) for folder in options.runs]
        note = never_learnt(*base)
        tests = [test for other in others for test in paired_tests(base, other)]
        print(paired_table(tests, options.format, [] if note is None else [note]))
        return 0
    print(comparison_table(read_runs(options.runs), options.format))
    return 0


def _attack(options: opt.AttackOptions) -> int:
    from fastvkd.attacks.run import attack_run, attack_table
    from fastvkd.progress import Progress

    with Progress("Attacking") as bar:
        found = attack_run(options, bar)
    print(attack_table(found))
    verdict = found["certificate"]["verdict"]
    print(f"Certificate: {verdict}; {options.out / 'certificate.json'}")
    _print_report_command(options.out)
    return 1 if verdict == "failed" else 0


def _report(options: opt.ReportOptions) -> int:
    from fastvkd.reporting import write_page

    print("\n".join(write_page(options.runs, options.out, options.data)))
    return 0


def _print_report_command(folder: Path | str) -> None:
    """Say how the page of a finished run is made."""
    print(f"Page: fastvkd report {shlex.quote(str(folder))} --out report.html (and other runs of this model beside it)")


def _steer(options: opt.SteerOptions) -> int:
    from fastvkd.unlearning.steering import fit_to_folder

    told = dataclasses.asdict(options)
    out = told.pop("out")
    steering = fit_to_folder(told.pop("model"), told.pop("data"), **told)
    out.parent.mkdir(parents=True, exist_ok=True)
    steering.save(out)
    print(f"{out}: layers {', '.join(map(str, steering.directions))}; no weight was changed")
    return 0


def _plan(options: opt.PlanOptions) -> int:
    from fastvkd.planning.plan import plan
    from fastvkd.settings import load_settings

    # a plan needs no data; whatever is named takes the place of this
    settings = load_settings(options.config, ["data=DATA", *options.overrides])
    result = plan(settings, gpu=options.gpu, memory=options.memory, world_size=options.world_size)
    print(json.dumps(result.to_dict(), indent=1) if options.json else result.table())
    return 0


def _export(options: opt.ExportOptions) -> int:
    from fastvkd.engines.exporting import export
    from fastvkd.reporting.model_card import run_card

    done = export(options.run, options.to, model_card=run_card(options.run, options.base), base=options.base)
    print(
        f"{done.folder}: {done.tensors} tensors replaced in {len(done.rewritten_shards)} shard(s), "
        f"{len(done.copied_shards)} shard(s) copied untouched" + (" (blocks shared)" if done.reflinked else "")
    )
    weights = [name for name in done.left_out if name not in done.statements]
    for why, names in (("hold the weights from before", weights), ("speak of the base model", done.statements)):
        if names:
            print(f"Left out, since they {why}: {', '.join(names)}")
    return 0


def _merge(options: opt.MergeOptions) -> int:
    from fastvkd.engines.merging import merge

    done = merge(options.adapter, options.to, base=options.base)
    print(f"{done.folder}: {done.tensors} tensors changed by the adapter; base: {done.base}")
    return 0


def _requests(options: opt.RequestsOptions) -> int:
    from fastvkd.data.sources import profiles_of_splits
    from fastvkd.data.tables import person_key
    from fastvkd.engines.requests import found_in, requests_of

    if not options.model.is_dir():
        raise ModelError(f"{options.model}: no such folder; give the folder of a model")
    requests = requests_of(options.model)
    told: dict[str, Any] = {"model": str(options.model), "requests": [request.described() for request in requests]}
    lines = [request.line() for request in requests] or [f"{options.model}: no request to forget in its record"]
    if options.data is not None:
        splits = profiles_of_splits(options.data, options.split, local_files_only=options.local_files_only)
        told |= {"data": options.data, "found": (found := found_in(requests, splits))}
        entities = {person_key(profile.entity) for profiles in splits.values() for profile in profiles}
        among = len({person_key(one["entity"]) for one in found})
        lines.append(f"{options.data}: {among:,} of {len(entities):,} entities are among the forgotten")
        lines += [
            f"{one['entity']}  request {one['request']}, told by {one['told_by']}, in {', '.join(one['splits'])}"
            for one in found
        ]
    print(json.dumps(told, indent=1) if options.json else "\n".join(lines))
    return 0


def _purge(options: opt.PurgeOptions) -> int:
    from fastvkd.engines.purging import described, purge

    for run in options.runs:
        found = purge(run, cache=options.cache, dry_run=options.dry_run)
        print("\n".join(described(found, dry_run=options.dry_run)))
    return 0


def _data_check(options: opt.CheckOptions) -> int:
    from fastvkd.data.check import check_data
    from fastvkd.progress import Progress

    with Progress("Checking") as bar:
        report = check_data(
            options.path,
            bar,
            model=options.model,
            max_pixels=options.max_pixels,
            forget_split=options.forget_split,
            retain_split=options.retain_split,
            local_files_only=options.local_files_only,
        )
    print(json.dumps(dataclasses.asdict(report), indent=1) if options.json else "\n".join(report.lines()))
    return 0 if report.ok else 2


def _env(options: opt.EnvOptions) -> int:
    from fastvkd.environment import describe

    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
