"""The command `moe-course`. Errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_course import __version__


class UsageError(Exception):
    """What was asked for cannot be done; its text is the one line the user sees."""


def _count(args: argparse.Namespace) -> int:
    from moe_course.specs import ModelSpec

    try:
        config = json.loads(Path(args.config).read_text(encoding="utf-8-sig"))
        spec = ModelSpec.from_hf_config(config, Path(args.config).name)
    except OSError as error:
        raise UsageError(f"cannot read {args.config}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{args.config} is not JSON: {error}") from error
    except ValueError as error:
        raise UsageError(f"{args.config}: {error}") from error
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
    count = commands.add_parser(
        "count", help="count the parameters of a published config.json"
    )
    count.add_argument("config", metavar="config.json")
    count.set_defaults(run=_count)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


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
