"""`keras-upcycle convert`: a dense model on disk in, a sparse one out."""

import argparse
import math
from dataclasses import dataclass
from typing import Any

from keras_upcycle import atomic_files, tables
from keras_upcycle.cli import arguments, options, paths, stages
from keras_upcycle.cli import output as answers


def add(subparsers) -> None:
    """Adds `convert`."""
    parser = arguments.add_command(
        subparsers,
        "convert",
        summary="make a sparse model of a dense one, and verify it",
        description=(
            "Reads a dense model, replaces feed-forward blocks by experts\n"
            "that start as the dense blocks, writes the result, reads it\n"
            "again and verifies it: every weight must be read as it was\n"
            "written, and the dense and the sparse model's outputs are\n"
            "compared on the same inputs.\n"
            "\n"
            "The output appears under its name when all that is done, and\n"
            "not before. Nothing is ever overwritten. A task stays a task,\n"
            "with its tokenizer and preprocessor, a backbone a backbone.\n"
            "What an earlier convert to the same name left beside it, because\n"
            "it was killed, is mentioned and removed.\n\n"
            "Exit code 1: the verification failed, and nothing was kept."
        ),
        examples=arguments.examples(
            "keras-upcycle convert vit_base_patch16_224_imagenet ./vit_moe "
            "--num-experts 32",
            "keras-upcycle convert ./vit moe.keras --num-experts 8 "
            "--layers 7,9,11",
            "keras-upcycle convert ./vit ./vit_moe --num-experts 8 "
            "--router top_k --top-k 2",
            "keras-upcycle convert ./t5 ./t5_moe --num-experts 8 "
            "--layers encoder=none,decoder=1,3",
            "keras-upcycle convert ./t5 ./t5_moe --num-experts 8 "
            "--router encoder=expert_choice,decoder=top_k",
            "keras-upcycle convert ./t5 ./t5_moe --num-experts 8 "
            "--recipe sparse_upcycling",
            "keras-upcycle convert dense.keras moe.keras --num-experts 4 "
            "--json",
        ),
    )
    parser.add_argument("model", help=arguments.MODEL_HELP)
    parser.add_argument(
        "output",
        help=(
            "a name that is still free: a file if it ends in .keras, else a "
            "preset folder"
        ),
    )
    options.add(parser, num_experts=None)
    parser.add_argument(
        "--seed",
        type=arguments.seed,
        metavar="N",
        help="of the routers' kernels (default: drawn)",
    )
    arguments.add_dtype(parser)
    arguments.add_inputs(parser)
    parser.add_argument(
        "--tolerance",
        type=arguments.tolerance,
        metavar="X",
        help=(
            "also fail if the outputs, on those inputs, differ by more, "
            "relative to the largest output. Only told by default, since "
            "Expert Choice leaves some tokens to no expert"
        ),
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not read and verify what was written",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=lambda args: answers.give(run, args))


def run(args: argparse.Namespace) -> answers.Answer:
    """Runs `convert`: everything that can be checked first, then the work."""
    # First of all: what is left may take the room that is needed now.
    atomic_files.clean(*paths.beside(args.output))
    output = paths.output(args.output)
    source = paths.source(args.model)
    paths.check_inputs(args.inputs)
    inputs = None
    outcome = _Outcome()
    with stages.Stages(3 if args.no_verify else 5) as progress:
        with progress.stage("load"):
            from keras_upcycle.cli import example_inputs, model_files
            from keras_upcycle.conversion.estimate import estimate_upcycle
            from keras_upcycle.conversion.upcycle import upcycle_model

            given = options.read(args)
            dense = model_files.load(source, args.dtype, compile=True)
            model_files.check_form(dense, output)
            estimate = estimate_upcycle(dense, args.num_experts, **given)
            paths.check_space(output, estimate.weight_bytes)
            parts = model_files.beside(source, dense)
        if not args.no_verify:
            with progress.stage("inputs"):
                inputs = example_inputs.get(dense, args.inputs)
        with atomic_files.Staged(output) as staged:
            with progress.stage("convert"):
                sparse = upcycle_model(
                    dense, args.num_experts, seed=args.seed, **given
                )
            written = None if args.no_verify else model_files.digests(sparse)
            with progress.stage("save"):
                model_files.save(sparse, staged.place, parts)
            if not args.no_verify:
                # The same is about to be read, and memory may not hold both.
                del sparse
                with progress.stage("verify"):
                    loaded = _read_again(dense, staged.place)
                    outcome = _verify(
                        dense, loaded, written, inputs, args.tolerance
                    )
            size = paths.size(staged.place)
            if outcome.passed:
                staged.keep()
    record = {
        "model": source.place,
        "output": str(output),
        "kept": outcome.passed,
        "bytes": size,
        "seconds": progress.seconds,
        "estimate": answers.fields(estimate),
        "tolerance": args.tolerance,
        "report": outcome.report and answers.fields(outcome.report),
        "changed_weights": outcome.changed,
    }
    end = (
        f"Written: {output}, {tables.size(size)}."
        if outcome.passed
        else f"Verification failed. Nothing was kept: there is no {output}."
    )
    text = "\n\n".join([str(estimate), *outcome.lines, end])
    return answers.Answer(text, record, outcome.passed)


@dataclass(frozen=True)
class _Outcome:
    """What the verification found; by default that there was none.

    Attributes:
        passed: Whether the output is to be kept.
        report: An `UpcycleReport`.
        changed: Paths of weights that were not read as they were written.
        lines: The same in words.
    """

    passed: bool = True
    report: Any = None
    changed: list[str] | None = None
    lines: tuple[str, ...] = ("Not verified.",)


def _read_again(dense, place):
    from keras_upcycle.cli import model_files

    source = paths.source(str(place))
    # A preset would be read in Keras's default policy, whatever it was.
    policy = dense.dtype_policy.name if source.kind == paths.FOLDER else None
    return model_files.load(source, policy)


def _verify(dense, loaded, written, inputs, tolerance):
    """Compares what was read with what was written, and with the dense one."""
    from keras_upcycle.cli import model_files
    from keras_upcycle.conversion.verify import verify_upcycle

    changed = model_files.changed(loaded, written)
    report = verify_upcycle(dense, loaded, inputs)
    lines = [str(report)]
    if changed:
        lines.append(
            f"Read back: {len(changed)} weights are not as written: "
            f"{', '.join(changed[:5])}."
        )
    else:
        lines.append(
            "Read back: every weight is as it was written, to the last bit."
        )
    difference = report.relative_difference
    within = math.isfinite(difference)
    if tolerance is not None and difference > tolerance:
        within = False
        lines.append(f"The output differs by more than {tolerance:g}.")
    return _Outcome(within and not changed, report, changed, tuple(lines))
