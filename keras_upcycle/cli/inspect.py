"""`keras-upcycle inspect`: what would be converted, and what it would cost."""

import argparse

from keras_upcycle import tables
from keras_upcycle.cli import arguments, options, output, paths, stages


def add(subparsers) -> None:
    """Adds `inspect`."""
    parser = arguments.add_command(
        subparsers,
        "inspect",
        summary="show what would be converted, what not and why, and the cost",
        description=(
            "Shows a model's feed-forward blocks, which of them a conversion\n"
            "would replace by experts, what was turned down and why, and the\n"
            "size and cost of the result. Nothing is converted or written.\n\n"
            "Exit code 1: the model cannot be converted so; says why."
        ),
        examples=arguments.examples(
            "keras-upcycle inspect vit_base_patch16_224_imagenet",
            "keras-upcycle inspect ./vit --num-experts 32 --layers all",
            "keras-upcycle inspect ./t5 --sequence-length "
            "encoder=512,decoder=114",
            "keras-upcycle inspect ./llama --devices 8 "
            "--tokens-per-device 4096",
            "keras-upcycle inspect ./llama --budget 16GB --train experts "
            "--batch-size 1 --sequence-length 1024",
            "keras-upcycle inspect ./llama --tokens-spent 74e9 "
            "--tokens-left 37e9",
            "keras-upcycle inspect dense.keras --json",
        ),
    )
    parser.add_argument("model", help=arguments.MODEL_HELP)
    options.add(parser, num_experts=8)
    parser.add_argument(
        "--sequence-length",
        type=arguments.lengths,
        metavar="S",
        help=(
            "tokens of an example, or of each stack's as in "
            "encoder=512,decoder=114: also estimate what an example costs"
        ),
    )
    parser.add_argument(
        "--devices",
        type=arguments.count,
        metavar="N",
        help=(
            "so many devices: for every mesh of them, what one would hold and "
            "send in a step of Adam"
        ),
    )
    parser.add_argument(
        "--tokens-per-device",
        type=arguments.count,
        metavar="T",
        help="tokens of a device's share of a batch, with --devices",
    )
    parser.add_argument(
        "--shard-dense",
        action="store_true",
        help="cut what is no expert among all devices, with --devices",
    )
    parser.add_argument(
        "--speed",
        type=arguments.rates,
        metavar="FLOPS,BYTES",
        help=(
            "operations and bytes over its link that a device does in a "
            "second, such as 1e14,5e10: also estimate a step's time"
        ),
    )
    parser.add_argument(
        "--budget",
        metavar="BYTES",
        help=(
            "memory of one device, such as 16GB: also say which numbers of "
            "whole and low-rank experts fit a step of training"
        ),
    )
    parser.add_argument(
        "--optimizer",
        default="adam",
        metavar="NAME",
        help="whose slots count, with --budget (default: %(default)s)",
    )
    parser.add_argument(
        "--train",
        default="all",
        metavar="PART",
        help="all, or experts alone, with --budget (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=arguments.count,
        metavar="N",
        help="examples of a step, with --budget and --sequence-length",
    )
    for name, meaning in (
        ("spent", "tokens that the model was trained on"),
        ("left", "tokens that it could be trained on for what is left"),
    ):
        parser.add_argument(
            f"--tokens-{name}",
            type=float,
            metavar="T",
            help=(
                f"{meaning}, such as 74e9; with both, also say whether "
                "upcycling is predicted to win"
            ),
        )
    arguments.add_dtype(parser)
    arguments.add_json(parser)
    parser.set_defaults(run=lambda args: output.give(run, args))


def run(args: argparse.Namespace) -> output.Answer:
    """Runs `inspect`."""
    source = paths.source(args.model)
    if (args.tokens_spent is None) != (args.tokens_left is None):
        raise ValueError(
            "Whether upcycling wins depends on the tokens spent and on those "
            f"left. Received: --tokens-spent={args.tokens_spent}, "
            f"--tokens-left={args.tokens_left}. Pass both or neither."
        )
    with stages.Stages(1) as progress, progress.stage("load"):
        from keras_upcycle import families
        from keras_upcycle.cli import model_files
        from keras_upcycle.conversion import model_checks, plan
        from keras_upcycle.conversion.estimate import estimate_upcycle
        from keras_upcycle.conversion.scaling_law import predict_upcycling
        from keras_upcycle.errors import UpcycleError

        given = options.read(args)
        model = model_files.load(source, args.dtype)
    family = findings = decided = estimate = problem = None
    fitting = predicted = None
    try:
        family = families.family_of(model)
        findings = family.find(model)
        settings = dict(given)
        decided = plan.make(
            model,
            args.num_experts,
            init=settings.pop("expert_init"),
            **settings,
        )
        estimate = estimate_upcycle(
            model,
            args.num_experts,
            sequence_length=args.sequence_length,
            mesh=args.devices,
            tokens_per_device=args.tokens_per_device,
            shard_dense=args.shard_dense,
            **given,
        )
        if args.budget is not None:
            fitting = estimate_upcycle(
                model,
                budget=args.budget,
                optimizer=args.optimizer,
                trainable=args.train,
                batch=args.batch_size,
                sequence_length=args.sequence_length,
                **given,
            )
        if args.tokens_spent is not None:
            predicted = predict_upcycling(
                model.count_params(),
                args.tokens_spent,
                args.tokens_left,
                flops_ratio=estimate.flops_ratio,
                num_experts=args.num_experts,
            )
        model_checks.check_donor(model)
    except UpcycleError as error:
        problem = str(error)
    blocks = [] if findings is None else _blocks(findings.sites, decided)
    rejected = [] if findings is None else findings.rejected
    record = {
        "model": source.place,
        "class": type(model).__name__,
        "name": model.name,
        "parameters": model.count_params(),
        "family": None if family is None else family.name,
        "blocks": blocks,
        "turned_down": [
            {"path": path, "reason": reason} for path, reason in rejected
        ],
        "estimate": None if estimate is None else output.fields(estimate),
        "budget": None if fitting is None else output.fields(fitting),
        "prediction": None if predicted is None else output.fields(predicted),
        "problem": problem,
    }
    text = _text(record, estimate, args.speed)
    for more in (fitting, predicted):
        if more is not None:
            text += f"\n\n{more}"
    return output.Answer(text, record, passed=problem is None)


def _blocks(sites, decided):
    """A record of each block; its number is what `--layers` counts."""
    routers = {} if decided is None else decided.routers
    numbers: dict[str, int] = {}
    found = []
    for site in sites:
        number = numbers.setdefault(site.stack, 0)
        numbers[site.stack] += 1
        router = routers.get(site.index)
        found.append(
            {
                "stack": site.stack,
                "number": number,
                "path": site.path,
                "hidden_dim": site.hidden_dim,
                "intermediate_dim": site.intermediate_dim,
                "gated": site.gated,
                "converted": router is not None,
                "router": None if router is None else type(router).__name__,
            }
        )
    return found


def _text(record, estimate, speed):
    lines = [
        f"{record['class']} {record['name']!r}, "
        f"{record['parameters']:,} parameters: "
        f"{len(record['blocks'])} feed-forward blocks found, "
        f"{len(record['turned_down'])} turned down."
    ]
    if record["blocks"]:
        lines.append(
            tables.text(
                ("block", "stack", "number", "width", "becomes"),
                [
                    (
                        block["path"],
                        block["stack"],
                        str(block["number"]),
                        f"{block['hidden_dim']} -> {block['intermediate_dim']}"
                        + (", gated" if block["gated"] else ""),
                        block["router"] or "stays dense",
                    )
                    for block in record["blocks"]
                ],
            )
        )
    lines += [
        f"Turned down: {down['path']}: {down['reason']}."
        for down in record["turned_down"]
    ]
    if estimate is not None:
        lines.append(str(estimate))
        if estimate.meshes and speed is not None:
            seconds = [
                f"{each.data_devices} x {each.expert_devices}: "
                f"{each.step_seconds(*speed):.3g} s"
                for each in estimate.meshes
            ]
            lines.append("A step, by mesh: " + ", ".join(seconds) + ".")
    if record["problem"] is not None:
        lines.append(f"Cannot be converted so. {record['problem']}")
    return "\n\n".join(lines)
