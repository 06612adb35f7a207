"""``hzo zoo``: sweep the families of installed libraries, or print the table of a sweep."""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from hzo_lab.records import disk_errors
from hzo_lab.zoo import table
from hzo_lab.zoo.case import NotBuiltError
from hzo_lab.zoo.registry import LIBRARIES, Family, distribution, families
from hzo_lab.zoo.runner import Limits, read_results, run
from hzo_lab.zoo.subset import SMOKE
from hzo_lab.zoo.trial import NOT_BUILT, REFUSED, RIGHT, SLOW, Record

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended
RESULTS = Path("results/zoo/families.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 where a gradient is wrong, or a family that should be right is not."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.page is not None:
        with disk_errors(f"writing {options.page}", "choose another place with --page"):
            options.page.write_text(table.page(read_results(options.results)), encoding="utf-8")
        return 0
    if options.table or options.count_calls:
        records = read_results(options.results)
        print(table.calls(records) if options.count_calls else table.table(records, options.markdown))
        if options.table:
            print("\n" + table.counts(records))
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    torch.set_num_threads(1)
    named = _named(options)
    unknown = [p for p in options.families if not any(fnmatch.fnmatch(str(family), p) for family in named)]
    if unknown or not named:
        what = ", ".join(map(repr, unknown)) or "nothing"
        parser.error(f"{what} fits no family of the libraries that are installed; --list prints their names")
    share, of = options.shard
    chosen = named[share::of]
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    print(_surroundings(), file=sys.stderr)
    done = 0

    def progress(record: Record) -> None:
        nonlocal done
        done += 1
        error = "" if record.get("error") is None else f" {record['error']:.1e}"
        reason = f" ({record['reason'][:160]})" if record.get("reason") else ""
        name = f"{record['library']}:{record['family']}"
        print(
            f"{done}/{len(chosen)} {record['wall_seconds']:.1f} s {name}: {record['verdict']}{error}{reason}",
            flush=True,
        )

    limits = Limits(seconds=options.seconds, gib=options.gib)
    try:
        run(chosen, DTYPES[options.dtype], options.results, limits, options.again, options.calls, progress)
    except KeyboardInterrupt:
        print(f"Stopped. What was tried is kept in {options.results}: the same command goes on with the rest.")
        return INTERRUPTED
    names = {(f.library, f.name) for f in chosen}
    records = [
        r for r in read_results(options.results) if r["asked"] == options.dtype and (r["library"], r["family"]) in names
    ]
    print(table.counts(records))
    if options.all_right:
        return int(any(r["verdict"] != RIGHT for r in records))
    return int(any(r["verdict"] not in (RIGHT, REFUSED, SLOW, NOT_BUILT) for r in records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hzo zoo",
        usage="hzo zoo [options] [families ...]",
        description="Sweep the model families of installed libraries: is the gradient right, and what does it cost?",
    )
    parser.add_argument("families", nargs="*", help="patterns such as 'transformers:llama/*' or 'timm:*'; none: all")
    parser.add_argument(
        "--library",
        action="append",
        choices=LIBRARIES,
        metavar="NAME",
        help=f"this library alone, of {', '.join(LIBRARIES)}; again for another",
    )
    parser.add_argument("--smoke", action="store_true", help="40 families of transformers, for continuous integration")
    parser.add_argument(
        "--every-head", action="store_true", help="of transformers, the other heads of a model type too"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="of weights and inputs")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="file of JSON lines; what it holds is not tried again"
    )
    parser.add_argument("--again", action="store_true", help="try again what the file holds; the newer record counts")
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="K/N: the K-th of N shares, from 0")
    parser.add_argument("--seconds", type=_above_zero, default=120.0, help="limit of processor time for a family")
    parser.add_argument("--gib", type=_above_zero, default=12.0, help="limit of memory for a family")
    parser.add_argument("--calls", action="store_true", help="record the ATen calls on values that carry a gradient")
    parser.add_argument("--all-right", action="store_true", help="exit with 1 unless every family is right")
    parser.add_argument("--list", action="store_true", help="print the names of the families and stop")
    parser.add_argument("--table", action="store_true", help="print the table of the file and stop")
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument("--page", type=Path, help="write counts and causes as a page of Markdown there and stop")
    parser.add_argument(
        "--count-calls", action="store_true", help="print how many families use each ATen call and stop"
    )
    return parser


def _shard(text: str) -> tuple[int, int]:
    share, _, of = text.partition("/")
    if not (share.isdigit() and of.isdigit() and int(share) < int(of)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 0 to N - 1, such as 0/2 and 1/2; got {text!r}")
    return int(share), int(of)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _named(options: argparse.Namespace) -> list[Family]:
    """The families that the options name, in the order of the libraries."""
    if options.smoke:
        found = [Family("transformers", name) for name in SMOKE]
    else:
        found = []
        wanted = options.library or [
            name
            for name in LIBRARIES
            if not options.families or any(fnmatch.fnmatch(name, p.split(":")[0]) for p in options.families)
        ]
        for library in wanted:
            try:
                found += families(library, options.every_head)
            except NotBuiltError as error:
                print(f"{library} is left out: {error}", file=sys.stderr)
    if options.families:
        found = [f for f in found if any(fnmatch.fnmatch(str(f), pattern) for pattern in options.families)]
    return found


def _surroundings() -> str:
    """What a result depends on: versions and machine."""
    versions = []
    for library in LIBRARIES:
        try:
            versions.append(f"{distribution(library)} {metadata.version(distribution(library))}")
        except metadata.PackageNotFoundError:
            continue
    return f"python {platform.python_version()}, {', '.join(dict.fromkeys(versions))}, {platform.machine()}"
