"""`keras-upcycle export`: a sparse model for those who know none of this."""

import argparse
import pathlib
from typing import Any

from keras_upcycle import atomic_files, tables
from keras_upcycle.cli import arguments, paths, stages
from keras_upcycle.cli import output as answers


def add(subparsers) -> None:
    """Adds `export`."""
    parser = arguments.add_command(
        subparsers,
        "export",
        summary="write a sparse model as others read it",
        description=(
            "Reads a sparse model and writes it as a mixture that others\n"
            "know: a folder of Hugging Face with safetensors, config.json and\n"
            "the tokenizer, or a model of KerasHub's own class. A mixture of\n"
            "KerasHub's own is taken too.\n"
            "\n"
            "The output appears under its name when it is whole, and not\n"
            "before. Nothing is ever overwritten.\n\n"
            "Exit code 1: the format cannot say what the model is. All\n"
            "reasons are told, each with what would allow it."
        ),
        examples=arguments.examples(
            "keras-upcycle export ./llama_moe ./mixtral",
            "keras-upcycle export ./llama_moe ./mixtral --dtype bfloat16",
            "keras-upcycle export ./qwen3_moe ./stock --format keras_hub",
            "keras-upcycle export ./llama_moe --check",
        ),
    )
    parser.add_argument("model", help=arguments.MODEL_HELP)
    parser.add_argument(
        "output",
        nargs="?",
        help="a name that is still free; not needed with --check",
    )
    parser.add_argument(
        "--format",
        default="hugging_face",
        metavar="F",
        help="hugging_face or keras_hub (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="mixtral, qwen3_moe, ... (default: what suits the model)",
    )
    parser.add_argument(
        "--dtype",
        metavar="D",
        help=(
            "of the weights in a Hugging Face folder: float32, bfloat16 or "
            "float16 (default: the model's)"
        ),
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default=5.0,
        metavar="GB",
        help=(
            "largest file of weights, in 10^9 bytes or as in 500MB (default: "
            "%(default)g)"
        ),
    )
    parser.add_argument(
        "--untie-embeddings",
        action="store_true",
        help="write tied embeddings twice, where the target has them apart",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only say whether it can be exported, and if not, why",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=lambda args: answers.give(run, args))


def run(args: argparse.Namespace) -> answers.Answer:
    """Runs `export`."""
    place = _place(args)
    source = paths.source(args.model)
    with stages.Stages(1 if args.check else 2) as progress:
        with progress.stage("load"):
            from keras_upcycle.cli import model_files
            from keras_upcycle.export import reasons

            model = _sparse(model_files.load(source))
            parts = model_files.beside(source, model)
            found = reasons.check(
                model, args.format, args.target, args.untie_embeddings
            )
        if found and place is not None:
            with progress.stage("write"):
                _write(args, model, place, parts)
    written = bool(found) and place is not None
    record = {
        "model": source.place,
        "output": None if place is None else str(place),
        "written": written,
        "target": found.target,
        "reasons": list(found.reasons),
    }
    text = f"{args.model} {found}"
    if found and place is not None:
        size = tables.size(paths.size(place))
        text = f"Written: {place}, {size}, a {found.target}."
    return answers.Answer(text, record, bool(found))


def _place(args) -> pathlib.Path | None:
    if args.check:
        return None
    if args.output is None:
        raise ValueError(
            "`output` must say where to write. Received: none. Pass a name "
            "that is still free, or --check to be told whether it could be."
        )
    atomic_files.clean(*paths.beside(args.output))
    return paths.output(args.output)


def _sparse(model):
    """A mixture of KerasHub's own as one of ours; anything else as it is."""
    from keras_upcycle import families
    from keras_upcycle.conversion.adopt import adopt_model
    from keras_upcycle.layers import moe_layers

    if moe_layers.moe_layers_in(model):
        return model
    return (
        adopt_model(model)
        if families.family_of(model).mixtures(model)
        else model
    )


def _write(args, model: Any, place: pathlib.Path, parts: list[Any]) -> None:
    from keras_upcycle.cli import model_files
    from keras_upcycle.export.export_model import export_model

    settings = {
        "target": args.target,
        "untie_embeddings": args.untie_embeddings,
    }
    if args.format == "hugging_face":
        export_model(
            model,
            args.format,
            place,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            **settings,
        )
        return
    stock = export_model(model, args.format, dtype=args.dtype, **settings)
    with atomic_files.Staged(place) as staged:
        model_files.save(stock, staged.place, parts)
        staged.keep()


def _size(text):
    if text.endswith("B"):
        # Here, so that --help does not wait for NumPy.
        from keras_upcycle import checks

        try:
            checks.check_bytes("--max-shard-size", text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text
    value = arguments.number(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(
            f"must be a positive number. Received: {text}."
        )
    return value
