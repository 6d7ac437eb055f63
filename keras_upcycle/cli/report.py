"""`keras-upcycle report`: what the routers did, from a monitor's log."""

import argparse

from keras_upcycle.cli import arguments, output


def add(subparsers) -> None:
    """Adds `report`."""
    parser = arguments.add_command(
        subparsers,
        "report",
        summary="print what RouterMonitor logged of a training run",
        description=(
            "Reads the log of `RouterMonitor(log=...)`, of a run that is over\n"
            "or still goes on, and prints the latest reading of every block:\n"
            "its busiest expert against a fair share, dead experts, dropped\n"
            "assignments, tokens without an expert, entropy and confidence of\n"
            "the router, and its auxiliary losses.\n\n"
            "Exit code 1: with --max-dropped or --no-dead, some block is\n"
            "beyond what they allow."
        ),
        examples=arguments.examples(
            "keras-upcycle report routers.csv",
            "keras-upcycle report routers.csv --plot load.png",
            "keras-upcycle report routers.csv --no-dead --max-dropped 0.1",
            "keras-upcycle report routers.csv --json",
        ),
    )
    parser.add_argument("log", help="the CSV file that the monitor wrote")
    parser.add_argument(
        "--plot",
        metavar="IMAGE",
        help="also draw the loads over time, as .png, .svg or .pdf",
    )
    parser.add_argument(
        "--max-dropped",
        type=arguments.tolerance,
        metavar="SHARE",
        help="check that no block drops a larger share of its assignments",
    )
    parser.add_argument(
        "--no-dead",
        action="store_true",
        help="check that every expert of every block processes something",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=lambda args: output.give(run, args))


def run(args: argparse.Namespace) -> output.Answer:
    """Runs `report`."""
    from keras_upcycle.analysis import router_log, router_plots

    readings = router_log.read(args.log)
    if not readings:
        raise ValueError(
            f"The log must hold at least one reading. Received: {args.log}, "
            "which holds none yet. Wait for the first, or train longer than "
            "`RouterMonitor(every=...)` steps."
        )
    latest = {reading.layer: reading for reading in readings}
    failed = _failures(latest.values(), args)
    first, last = readings[0], readings[-1]
    lines = [
        f"{len(latest)} blocks, {len(readings)} readings, steps "
        f"{first.step - first.steps} to {last.step}.",
        router_log.summary(readings),
        *failed,
    ]
    if args.plot:
        router_plots.plot_expert_load(readings, args.plot)
        lines.append(f"Drawn to {args.plot}.")
    record = {
        "log": args.log,
        "readings": len(readings),
        "failures": failed,
        "blocks": {
            name: {
                **output.fields(reading),
                "load": reading.load.tolist(),
                "max_load": reading.max_load,
                "dead": list(reading.dead),
            }
            for name, reading in latest.items()
        },
    }
    return output.Answer("\n".join(lines), record, passed=not failed)


def _failures(readings, args):
    failed = []
    for reading in readings:
        if args.no_dead and reading.dead:
            failed.append(
                f"{reading.layer}: experts {list(reading.dead)} processed "
                "nothing."
            )
        limit = args.max_dropped
        if limit is not None and reading.dropped > limit:
            failed.append(
                f"{reading.layer}: {reading.dropped:.1%} of the assignments "
                f"were dropped, more than {limit:.1%}."
            )
    return failed
