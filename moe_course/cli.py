"""The command `moe-course`. Errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_course import __version__

if TYPE_CHECKING:
    from moe_course.costs.choice import Needs, Quality
    from moe_course.specs import ModelSpec


class UsageError(Exception):
    """What was asked for cannot be done; its text is the one line the user sees."""


def _read_spec(path: str, name: str) -> ModelSpec:
    from moe_course.specs import ModelSpec

    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        return ModelSpec.from_hf_config(config, name)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _count(args: argparse.Namespace) -> int:
    spec = _read_spec(args.config, Path(args.config).name)
    rows = [
        (name.replace("_", " "), *count)
        for name, count in spec.breakdown().items()
        if count.total
    ]
    rows.append(("all", spec.total_params(), spec.active_params()))
    print(f"{'parameters':<16}{'total':>22}{'active per token':>22}")
    for name, total, active in rows:
        print(f"{name:<16}{total:>22,}{active:>22,}")
    print(
        f"without the input embedding {spec.active_params(include_embedding=False):,} are active"
    )
    return 0


def _choose(args: argparse.Namespace) -> int:
    from moe_course.costs import choice

    try:
        needs = _needs(args)
        ranked = choice.rank(needs, _candidates(args), args.by)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.json:
        print(json.dumps(choice.as_dict(needs, ranked, args.by), indent=1))
    else:
        print(choice.table(needs, ranked, args.by))
    return 0 if any(judgement.met is not False for judgement in ranked) else 1


def _needs(args: argparse.Namespace) -> Needs:
    from moe_course.costs import Precision
    from moe_course.costs.choice import Needs
    from moe_course.specs import accelerators

    if (args.gpu is None) == (args.memory is None):
        raise UsageError("choose needs --gpu or --memory, one of the two")
    if args.gpu is not None and args.gpu not in accelerators:
        raise UsageError(
            f"--gpu {args.gpu} is unknown: it is one of {', '.join(accelerators)}; else give --memory in GB"
        )
    precision = None
    if args.bits is None and (args.expert_bits or args.cache_bits):
        raise UsageError("--expert-bits and --cache-bits need --bits, of all the rest")
    if args.bits is not None:
        experts = None if args.expert_bits is None else args.expert_bits / 8
        cache = 16 if args.cache_bits is None else args.cache_bits
        precision = Precision(args.bits / 8, experts, cache / 8)
    return Needs(
        accelerator=accelerators.get(args.gpu),
        devices=args.gpus,
        memory=None if args.memory is None else args.memory * 1e9,
        batch=args.batch,
        requests_per_s=args.requests,
        context=args.context,
        answer=args.answer,
        latency_ms=args.latency,
        training_flops=args.training_flops,
        tuning=args.tuning,
        data=args.data,
        precision=precision,
        quality=_quality(args),
        price=args.price,
    )


def _quality(args: argparse.Namespace) -> Quality | None:
    from moe_course.costs.choice import Quality

    figures = {}
    for text in args.quality:
        name, _, value = text.rpartition("=")
        try:
            figures[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"--quality is MODEL=NUMBER, got {text!r}")
    if not figures and args.least_quality is None:
        return None
    return Quality(args.measure, figures, args.least_quality)


def _candidates(args: argparse.Namespace) -> list[ModelSpec]:
    from moe_course.specs import zoo

    unknown = [name for name in args.model if name not in zoo]
    if unknown:
        raise UsageError(
            f"--model {unknown[0]} is not in the zoo: it has {', '.join(zoo)}; else give its --config"
        )
    specs = [zoo[name] for name in (args.model or zoo)]
    for path in args.config:
        file = Path(path)
        # Published configurations are all called config.json: their folder says more.
        name = file.parent.name if file.stem == "config" else file.stem
        specs.append(_read_spec(path, name or file.name))
    return specs


def _course_file(relative: str) -> Path:
    from moe_course.grading.notebook import find_upwards

    found = find_upwards(relative)
    if found is None:
        raise UsageError(
            f"{relative} was not found here or above: run this inside the course's folder"
        )
    return found


def _copy_once(source: Path, target: Path) -> bool:
    """Copy a file, whole or not at all, and never over somebody's work. False where there is one already."""
    target.parent.mkdir(exist_ok=True)
    if target.is_file():
        return False
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_bytes(source.read_bytes())
        # Unlike replace, this fails where the target exists; without hard links (some network drives), copy.
        try:
            os.link(partial, target)
        except FileExistsError:
            raise
        except OSError:
            with target.open("xb") as copy:
                copy.write(partial.read_bytes())
    finally:
        partial.unlink(missing_ok=True)
    return True


def _start(args: argparse.Namespace) -> int:
    from moe_course.grading.core import load_exercise

    try:
        exercise = load_exercise(args.number)
    except ValueError as error:
        raise UsageError(str(error)) from error
    source = _course_file(f"exercises/{exercise.stem}.ipynb")
    target = source.parents[1] / "my_work" / source.name
    try:
        copied = _copy_once(source, target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    print(
        f"Your copy: {target}"
        if copied
        else f"Your copy is already there, and stays as it is: {target}"
    )
    if args.no_open:
        return 0
    if (
        shutil.which(
            "jupyter-lab",
            path=os.pathsep.join(
                [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
            ),
        )
        is None
    ):
        raise UsageError(
            "JupyterLab is not installed: pip install 'moe_course[exercises]', or open the copy elsewhere"
        )
    os.chdir(target.parent)
    return os.spawnv(
        os.P_WAIT, sys.executable, [sys.executable, "-m", "jupyterlab", target.name]
    )


def _check(args: argparse.Namespace) -> int:
    from moe_course.grading.notebook import summary
    from moe_course.grading.run import UnreadableError, notebooks, read, run

    try:
        if not all(args.notebooks):
            raise UsageError(
                "an empty name is no notebook: name a notebook or a folder"
            )
        paths = notebooks([Path(p) for p in args.notebooks])
    except UnreadableError as error:
        raise UsageError(str(error)) from error
    code = 0
    for path in paths:
        try:
            read(path)
            print(f"\n{path}", flush=True)
            result = run(path)
        except UnreadableError as error:
            print(f"moe-course: {error}", file=sys.stderr)
            code = 2
            continue
        for outcome in result.outcomes:
            print(outcome.text())
        for trouble in result.troubles:
            print(f"! {trouble}")
        print(summary(result.number, result.outcomes))
        if not result.full and code == 0:
            code = 1
    return code


def _grade(args: argparse.Namespace) -> int:
    from moe_course.grading import batch, gradescope, report, sandbox
    from moe_course.grading.core import load_exercise
    from moe_course.grading.judge import GRADED, UNREADABLE
    from moe_course.grading.roster import assign, filled, read_roster
    from moe_course.grading.run import UnreadableError
    from moe_course.grading.submissions import collect, read

    if args.jobs < 1:
        raise UsageError(f"-j must be at least 1, got {args.jobs}")
    out = Path(args.out)
    try:
        exercise = load_exercise(args.exercise)
        settings = batch.Settings(
            args.exercise,
            args.seed,
            batch.read_private(Path(args.private_checks), args.exercise)
            if args.private_checks
            else "",
            sandboxed=not args.unsafe_no_sandbox,
        )
        private = settings.private_checks()
        submissions = collect([Path(p) for p in args.submissions])
        most = {
            q.id: q.points + sum(i.points for i in private.get(q.id, ()))
            for q in exercise.questions
        }
        roster = read_roster(Path(args.roster)) if args.roster else None
        if args.export and (roster is None or roster.kind != args.export):
            raise UsageError(
                f"--export {args.export} fills the gradebook that {args.export} exported: give it with --roster"
            )
        if roster is not None:
            if args.export:
                filled(
                    roster, {}, args.column
                )  # is there such a column? not after hours
            submissions, strangers = assign(submissions, roster)
            for name in strangers:
                print(
                    f"moe-course: {name} belongs to nobody in the roster",
                    file=sys.stderr,
                )
        overrides = (
            batch.read_overrides(Path(args.overrides), most) if args.overrides else {}
        )
    except (ValueError, UnreadableError, batch.GradesError) as error:
        raise UsageError(str(error)) from error
    if settings.sandboxed and (why := sandbox.why_not()) is not None:
        if not args.sandbox_if_possible:
            raise UsageError(
                f"no sandbox here ({why}): others' work is not run without one. `moe-course check` runs your own; "
                "--unsafe-no-sandbox runs this as you, with all your rights, and marks the results"
            )
        settings = replace(settings, sandboxed=False)
    progress = _Progress(len(submissions))
    executor, jobs, close = _executor(args)
    try:
        graded = batch.grade_batch(
            read(submissions), settings, out, executor, jobs, progress.add
        )
        summary = report.Summary(exercise)

        def decided() -> Iterator[tuple[str, Any]]:
            for student, result in batch.rows(graded, settings, out):
                yield student, batch.overridden(student, result, overrides)

        for student, result in decided():
            summary.add(student, result)
            page = report.feedback(student, result, exercise)
            batch.write(out / "feedback" / report.feedback_name(student), page)
        batch.write(out / "grades.csv", batch.table(decided()))
        batch.write(out / "grades.json", batch.as_json(decided()))
        batch.write(out / "summary.html", summary.page())
        if args.gradescope:
            # The file that was graded, should there be others beside it.
            best = min(decided(), key=lambda each: each[1].status == UNREADABLE)
            batch.write(Path(args.gradescope), gradescope.results(best[1]))
        if args.export and roster is not None:
            # What nobody could grade yet is no 0: its cell stays as it was.
            points = {
                student: result.points
                for student, result in decided()
                if result.status == GRADED
            }
            batch.write(out / f"{args.export}.csv", filled(roster, points, args.column))
    except batch.GradesError as error:
        raise UsageError(str(error)) from error
    finally:
        progress.end()
        close()
    counts = ", ".join(
        f"{n} {status}" for status, n in sorted(summary.statuses.items())
    )
    print(f"{len(submissions)} submissions: {counts}. {out / 'summary.html'}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from moe_course.grading import batch, gradescope
    from moe_course.grading.core import load_exercise

    private = Path(args.private_checks) if args.private_checks else None
    try:
        load_exercise(args.exercise)
        if private is not None:
            text = batch.read_private(private, args.exercise)
            batch.Settings(args.exercise, private=text).private_checks()
    except ValueError as error:
        raise UsageError(str(error)) from error
    root = _course_file("constraints.txt").parent
    try:
        gradescope.export(root, Path(args.out), args.exercise, args.seed, private)
    except OSError as error:
        raise UsageError(f"cannot write {args.out}: {error.strerror}") from error
    print(f"{args.out}: upload it as the autograder of exercise {args.exercise}")
    return 0


def _executor(args: argparse.Namespace) -> tuple[Executor, int, Callable[[], Any]]:
    """Where submissions are graded: here, in processes, or wherever a scheduler of dask has workers."""
    from moe_course.grading import batch

    if not args.scheduler:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        from moe_course.processes import end_with_parent

        # Spawned: a fork of a process that uses torch may hang.
        pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), end_with_parent)
        return pool, args.jobs, lambda: pool.shutdown(wait=True, cancel_futures=True)
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(
            "--scheduler needs dask: pip install 'moe_course[cluster]'"
        ) from error
    try:
        client: Any = Client(args.scheduler, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UsageError(f"no scheduler at {args.scheduler}: {error}") from error
    jobs = sum(client.nthreads().values())
    if not jobs:
        client.close()
        raise UsageError(f"the scheduler at {args.scheduler} has no workers")

    def close() -> None:
        client.run(batch.close_spare)
        client.close()

    return client.get_executor(pure=False), jobs, close


class _Progress:
    """One line on the terminal: how many are done, and about how long the rest takes."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.new = total, 0, 0
        self.begin = time.monotonic()

    def add(self, _submission: object, _result: object, stored: bool) -> None:
        self.done += 1
        self.new += not stored
        spent = time.monotonic() - self.begin
        left = spent / self.new * (self.total - self.done) if self.new else 0.0
        line = f"{self.done} of {self.total} graded"
        if left:
            line += (
                f", about {left / 60:.0f} min left"
                if left > 90
                else f", about {left:.0f} s left"
            )
        print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        print(file=sys.stderr)


def _doctor(args: argparse.Namespace) -> int:
    from moe_course.doctor import report

    return report()


def _version(args: argparse.Namespace) -> int:
    print(f"moe-course {__version__}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-course", description="Companion of the course on Mixture-of-Experts."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="check this machine and say how to mend what is missing"
    )
    doctor.set_defaults(run=_doctor)
    start = commands.add_parser(
        "start", help="copy an exercise to my_work/ and open it in JupyterLab"
    )
    start.add_argument("number", help="number of the exercise, such as 01")
    start.add_argument("--no-open", action="store_true", help="only make the copy")
    start.set_defaults(run=_start)
    check = commands.add_parser(
        "check",
        help="run your notebooks and show points",
        description="Exit code 0 at full marks, 1 below them, 2 where a file cannot be read.",
    )
    check.add_argument("notebooks", nargs="+", metavar="NOTEBOOK_OR_FOLDER")
    check.set_defaults(run=_check)
    grade = commands.add_parser(
        "grade",
        help="grade the notebooks of a class, each in a sandbox",
        description="Exit code 0 when every submission has a result, whatever the marks. Stopped at any moment, the "
        "same command goes on.",
    )
    grade.add_argument("submissions", nargs="+", metavar="FILE_FOLDER_OR_ZIP")
    grade.add_argument("--exercise", required=True, metavar="NN")
    grade.add_argument("-o", "--out", required=True, metavar="FOLDER")
    grade.add_argument(
        "-j", "--jobs", type=int, default=os.cpu_count() or 1, metavar="N"
    )
    grade.add_argument(
        "--seed", default="", help="of the random draws: one per class, and secret"
    )
    grade.add_argument(
        "--private-checks",
        default="",
        metavar="FOLDER",
        help="with your own NN_topic.py",
    )
    grade.add_argument(
        "--overrides",
        metavar="CSV",
        help="student, question, points, reason: settled by hand",
    )
    grade.add_argument(
        "--scheduler", metavar="tcp://HOST:PORT", help="of dask: grade on its workers"
    )
    grade.add_argument(
        "--roster",
        metavar="CSV",
        help="Canvas's gradebook or Moodle's worksheet: whose file is whose",
    )
    grade.add_argument(
        "--export",
        choices=["canvas", "moodle"],
        help="fill the roster for import there",
    )
    grade.add_argument(
        "--column", help="of the roster to fill (Canvas: as in its header)"
    )
    grade.add_argument(
        "--unsafe-no-sandbox", action="store_true", help="run submissions as you"
    )
    grade.set_defaults(run=_grade)
    grade.add_argument(
        "--gradescope", metavar="FILE", help="results.json of one submission"
    )
    grade.add_argument(
        "--sandbox-if-possible", action="store_true", help="else without, and say so"
    )
    export = commands.add_parser("export", help="a zip that Gradescope runs")
    export.add_argument("host", choices=["gradescope"])
    export.add_argument("--exercise", required=True, metavar="NN")
    export.add_argument("-o", "--out", required=True, metavar="FILE.zip")
    export.add_argument(
        "--seed", default="", help="of the random draws: one per class, and secret"
    )
    export.add_argument("--private-checks", default="", metavar="FOLDER")
    export.set_defaults(run=_export)
    count = commands.add_parser(
        "count", help="count the parameters of a published config.json"
    )
    count.add_argument("config", metavar="config.json")
    count.set_defaults(run=_count)
    _add_choose(commands)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_choose(commands: Any) -> None:
    choose = commands.add_parser(
        "choose",
        help="which models meet your needs, and why",
        description="Rules first, each with its figure, its limit and where the course shows it; then an order by one "
        "criterion. Times are lower bounds. Exit code 0, or 1 where every model misses a rule.",
    )
    option = choose.add_argument
    option("--gpu", metavar="NAME", help="such as H100-SXM")
    option("--gpus", type=int, default=1, metavar="N")
    option(
        "--memory", type=float, metavar="GB", help="in place of a GPU: no times then"
    )
    option("--batch", type=int, metavar="N", help="sequences decoded at once")
    option("--requests", type=float, metavar="PER_S", help="in place of --batch")
    option(
        "--context", type=int, default=4096, metavar="TOKENS", help="with the answer"
    )
    option("--answer", type=int, default=0, metavar="TOKENS", help="of each request")
    option("--latency", type=float, metavar="MS", help="a token, at most")
    option("--training-flops", type=float, metavar="FLOPS", help="budget, such as 1e23")
    option("--tuning", default="none", choices=["none", "lora", "full"])
    option("--data", choices=["one domain", "diverse"])
    option("--bits", type=float, help="a weight; as published unless given")
    option("--expert-bits", type=float, metavar="BITS", help="where experts differ")
    option("--cache-bits", type=float, metavar="BITS", help="a number of the cache: 16")
    option("--quality", action="append", default=[], metavar="MODEL=NUMBER")
    option(
        "--measure", default="", metavar="TEXT", help="what --quality is: MMLU, 5-shot"
    )
    option("--least-quality", type=float, metavar="NUMBER")
    option("--price", type=float, default=1.0, help="of one GPU and hour")
    option(
        "--model", action="append", default=[], metavar="NAME", help="not all the zoo"
    )
    option(
        "--config", action="append", default=[], metavar="config.json", help="one more"
    )
    option(
        "--by",
        default="cost",
        metavar="WHAT",
        help="order: cost, latency, memory, tokens, quality or value",
    )
    option("--json", action="store_true", help="for programs")
    choose.set_defaults(run=_choose)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Windows console may have no ✓
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"moe-course: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moe-course: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `moe-course check ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
