"""`declip train`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from declip.cli.terminal import command, console, folder, is_rank, positive, whole
from declip.errors import InputError


def add_train(commands: Any) -> None:
    example = "declip train declip data.train=pairs.parquet schedule.epochs=20 --out runs/mine"
    parser = command(commands, "train", _train, "train a recipe", example)
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name (see declip recipes) or a TOML file")
    parser.add_argument("overrides", metavar="path=value", nargs="*", help="change a field of the recipe")
    parser.add_argument("--out", type=folder, metavar="DIR", help="the run folder; not needed with --dry-run")
    parser.add_argument("--resume", action="store_true", help="go on where the run in DIR stopped")
    parser.add_argument(
        "--gpus", type=whole, metavar="N", help="train with N processes on this machine, a GPU each (or N on the CPU)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take 7 steps, write nothing, and tell what the run will need: parameters, memory, speed, hours",
    )
    parser.add_argument(
        "--price", type=positive, metavar="PER_HOUR", help="with --dry-run: of a GPU for an hour; tells the whole cost"
    )
    parser.set_defaults(rest="overrides")


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from declip.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)  # before PyTorch, so that a slip is answered at once
    _check_train(args)
    if args.gpus and not is_rank():
        return _launch(args)
    if args.dry_run:
        return _dry_run(args, recipe)
    from declip.training.loop import train

    summary = train(recipe, args.out, resume=args.resume, quiet=args.json)
    if not args.json:
        if "trained_share" in summary:
            share, scores = summary["trained_share"], summary["scores_by_share"]
            print(
                f"Best on the held-out pairs: {share:.0%} of the trained weights, the rest as at the start (score "
                f"{scores[share]:.1f}; all trained {scores[1.0]:.1f}, none {scores[0.0]:.1f})."
            )
        print(f"The run is in {args.out}. Judge it: declip evaluate {args.out} DATA")
    return summary


def _check_train(args: argparse.Namespace) -> None:
    if not args.dry_run and args.out is None:
        raise InputError("The following arguments are required: --out; declip train --help shows an example.")
    if args.dry_run and args.resume:
        raise InputError("--dry-run takes the first steps of a run and --resume later ones: leave one of them out.")
    if args.price is not None and not args.dry_run:
        raise InputError("--price is the price that --dry-run computes with: add --dry-run, or leave it out.")


def _launch(args: argparse.Namespace) -> dict[str, Any]:
    """`train` as several processes; theirs is what is said and the exit code."""
    from declip.training.launch import launch

    given = [f"--{name.replace('_', '-')}" for name in ("resume", "json", "dry_run") if getattr(args, name)]
    valued = [(f"--{name}", getattr(args, name)) for name in ("out", "price")]
    options = [str(part) for name, value in valued if value is not None for part in (name, value)]
    args.code, printed = launch(["train", args.recipe, *args.overrides, *options, *given], args.gpus)
    if args.code:
        raise SystemExit(args.code)
    if not args.json:
        print(printed, end="")
        return {}
    summary: dict[str, Any] = json.loads(printed)
    return summary


def _dry_run(args: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    from declip.training.estimate import estimate

    found = estimate(recipe, args.price)
    if found and not args.json:
        _print_estimate(found)
    return found


def _print_estimate(found: dict[str, Any]) -> None:
    """One table of what `training.estimate` has found."""
    from rich.table import Table

    ranks, on_cpu = found["ranks"], found["device"] == "cpu"
    table = Table(show_header=False, title=f"{found['recipe']} on {ranks} × {found['device']}", title_justify="left")
    for name, count in found["parameters"].items():
        table.add_row(f"parameters, {name}", f"{count:,}")
    table.add_section()
    for name, gigabytes in found["memory_gb"].items():
        table.add_row(f"memory, {name}", f"{gigabytes:.2f} GB")
    table.add_section()
    table.add_row("steps", f"{found['steps']:,} of {found['batch_size']:,} pairs")
    table.add_row("a step", f"{found['seconds_per_step']:.3f} s")
    table.add_row("pairs a second", f"{found['samples_per_second']:,.1f}")
    table.add_row("waiting for data", f"{found['data_wait']:.1%}")
    if "mfu" in found:
        table.add_row("MFU", f"{found['mfu']:.1%}")
    if found["held_out_scores"]:
        table.add_row("held-out scores", f"{found['held_out_scores']} of {found['seconds_per_score']:.1f} s")
    table.add_section()
    table.add_row("hours", f"{found['hours']:,.2f}")
    table.add_row("CPU-hours (hours × processes)" if on_cpu else "GPU-hours", f"{found['device_hours']:,.2f}")
    if found["cost"] is not None:
        table.add_row("cost", f"{found['cost']:,.2f}")
    console().print(table)
