"""`keras-upcycle verify`: how far a sparse model is from its dense one."""

import argparse

from keras_upcycle.cli import arguments, output, paths, stages


def add(subparsers) -> None:
    """Adds `verify`."""
    parser = arguments.add_command(
        subparsers,
        "verify",
        summary="compare a sparse model with the dense one it came from",
        description=(
            "Runs a dense model and what was made of it on the same inputs,\n"
            "and reports how far apart their outputs are, block by block, and\n"
            "why.\n\n"
            "Exit code 1: the outputs differ by more than the tolerance. That\n"
            "need not be a fault: Expert Choice leaves some tokens to no\n"
            "expert, and training moves the experts. The report tells them\n"
            "apart."
        ),
        examples=arguments.examples(
            "keras-upcycle verify ./vit ./vit_moe",
            "keras-upcycle verify ./vit ./vit_moe --inputs images.npz",
            "keras-upcycle verify dense.keras moe.keras --tolerance 0.01 "
            "--json",
        ),
    )
    parser.add_argument("dense", help=arguments.MODEL_HELP)
    parser.add_argument("sparse", help="what was made of it, in any such form")
    arguments.add_inputs(parser)
    parser.add_argument(
        "--tolerance",
        type=arguments.tolerance,
        default=arguments.TOLERANCE,
        metavar="X",
        help=(
            "largest difference of the outputs, relative to the largest "
            "output, that passes (default: %(default)g)"
        ),
    )
    arguments.add_json(parser)
    parser.set_defaults(run=lambda args: output.give(run, args))


def run(args: argparse.Namespace) -> output.Answer:
    """Runs `verify`."""
    sources = [paths.source(text) for text in (args.dense, args.sparse)]
    paths.check_inputs(args.inputs)
    with stages.Stages(2) as progress:
        with progress.stage("load"):
            from keras_upcycle.cli import example_inputs, model_files
            from keras_upcycle.conversion.verify import verify_upcycle

            dense, sparse = (model_files.load(source) for source in sources)
        with progress.stage("verify"):
            inputs = example_inputs.get(dense, args.inputs)
            report = verify_upcycle(dense, sparse, inputs)
    # Not `>`: a difference that is not a number is within nothing.
    passed = report.relative_difference <= args.tolerance
    verdict = (
        f"{'Within' if passed else 'Beyond'} the tolerance of "
        f"{args.tolerance:g}."
    )
    record = {
        "dense": sources[0].place,
        "sparse": sources[1].place,
        "tolerance": args.tolerance,
        "report": output.fields(report),
    }
    return output.Answer(f"{report}\n{verdict}", record, passed)
