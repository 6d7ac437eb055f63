"""The arguments of `upcycle_model` as options.

What they mean, and whether they suit a model, is decided there alone.
"""

import argparse
from collections.abc import Callable
from typing import Any

from keras_upcycle.cli import arguments

# Of a stack: it stays as it is.
DENSE = "none"


def add(parser: argparse.ArgumentParser, num_experts: int | None) -> None:
    """Adds what `upcycle_model` is told.

    Args:
        parser: Of the command.
        num_experts: The default; `None` where there is none.
    """
    group = parser.add_argument_group("conversion")
    group.add_argument(
        "--num-experts",
        type=arguments.count,
        required=num_experts is None,
        default=num_experts,
        metavar="E",
        help="experts of each converted block"
        + ("" if num_experts is None else f" (default: {num_experts})"),
    )
    group.add_argument(
        "--router",
        type=arguments.by_stack,
        metavar="R",
        help=(
            "top_k, expert_choice, or one for each stack: "
            "encoder=expert_choice,decoder=top_k. A stack that is not named "
            "gets its default, and one that says none stays dense (default: "
            "what suits the model)"
        ),
    )
    group.add_argument(
        "--top-k",
        type=arguments.count,
        metavar="K",
        help="experts a token, of the top_k routers in --router (default: 2)",
    )
    group.add_argument(
        "--capacity-factor",
        type=_factor,
        metavar="C",
        help=(
            "of the routers in --router. expert_choice: experts that process "
            "a token on average (default: 2). top_k: size of the buffers in "
            "training, or none to drop nothing (default: 1.25)"
        ),
    )
    group.add_argument(
        "--layers",
        type=arguments.by_stack,
        metavar="L",
        help=(
            "last_half, every_other, all (the first block too), "
            "all_but_first, block numbers such as 1,3,5 (write "
            "--layers=-2,-1 to count from the end), names of blocks, which "
            "`inspect` lists, or any of these for each "
            "stack: encoder=every_other,decoder=1,3. A stack that is not "
            "named gets its default, and one that says none stays dense "
            "(default: what suits the model)"
        ),
    )
    group.add_argument(
        "--expert-init",
        metavar="I",
        help=(
            "what experts start from: copy, drop_upcycling, random and others "
            "(default: the recipe's, or copy)"
        ),
    )
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help=(
            "what a paper chose, where you choose nothing: sparse_upcycling, "
            "drop_upcycling, virtual_group and others"
        ),
    )
    group.add_argument(
        "--target",
        metavar="NAME",
        help=(
            "what `keras-upcycle export` is to make of the result: mixtral "
            "or qwen3_moe. Chooses router and blocks where you do not"
        ),
    )


def read(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `upcycle_model` and `estimate_upcycle`.

    Raises:
        ValueError: For what no model could be converted with.
    """
    import keras_upcycle.methods  # noqa: F401  they make their names known
    from keras_upcycle import checks
    from keras_upcycle.conversion import targets
    from keras_upcycle.conversion.recipe import get_recipe
    from keras_upcycle.layers.expert_init import INITS

    if args.recipe is not None:
        get_recipe(args.recipe)
    if args.target is not None:
        checks.check_choice("--target", args.target, targets.CHOICES)
    if args.expert_init is not None:
        checks.check_choice("--expert-init", args.expert_init, sorted(INITS))
    return {
        "expert_init": args.expert_init,
        "router": _routers(args),
        "layers": _each("--layers", args.layers, _layers),
        "recipe": args.recipe,
        "target": args.target,
    }


def _routers(args):
    from keras_upcycle import checks
    from keras_upcycle.routing.registry import ROUTERS
    from keras_upcycle.routing.top_k_router import TopKRouter

    top_k = [n for n, kind in ROUTERS.items() if issubclass(kind, TopKRouter)]
    words = [word for each in (args.router or {}).values() for word in each]
    if args.top_k is not None and not set(words) & set(top_k):
        raise ValueError(
            "`--top-k` is a setting of top_k routers, which `--router` must "
            f"name. Received: --top-k {args.top_k} and no such router. Add "
            "`--router top_k`, or a stack's, such as `--router decoder=top_k`."
        )
    if args.capacity_factor is not None and not words:
        raise ValueError(
            "`--capacity-factor` means something else for each kind of "
            "router, so `--router` must name one. Received: --capacity-factor "
            f"{args.capacity_factor} alone. Add `--router expert_choice`, say."
        )

    def router(names):
        name = " ".join(names)
        checks.check_choice("--router", name, sorted(ROUTERS))
        given = {}
        if args.capacity_factor is not None:
            given["capacity_factor"] = args.capacity_factor
        if args.top_k is not None and name in top_k:
            given["top_k"] = args.top_k
        if args.capacity_factor == DENSE:
            given["capacity_factor"] = None
        unknown = given.keys() - ROUTERS[name]().get_config().keys()
        if unknown:
            raise ValueError(
                f"A {name} router has no buffers, and no {unknown.pop()}. "
                f"Received: --capacity-factor {args.capacity_factor}. Leave "
                "it out."
            )
        return ROUTERS[name](**given) if given else name

    return _each("--router", args.router, router)


def _layers(words):
    from keras_upcycle import checks
    from keras_upcycle.conversion import selection

    numbers = [word for word in words if word.lstrip("-").isdigit()]
    if len(numbers) == len(words):
        return [int(word) for word in words]
    if numbers:
        known = (*selection.LAYER_CHOICES, "block numbers", "names of blocks")
        checks.check_choice("--layers", ",".join(words), known)
    # A rule, or blocks' names, which the model knows.
    return words[0] if len(words) == 1 else words


def _each(name: str, given: arguments.ByStack | None, make: Callable) -> Any:
    """One setting for all, a mapping of them by stack, or `None`."""
    if given is None:
        return None
    if None not in given:
        return {
            stack: None if words == [DENSE] else make(words)
            for stack, words in given.items()
        }
    if given[None] == [DENSE]:
        raise ValueError(
            f"`{name} none` would leave nothing to convert. Say it of one "
            f"stack, such as `{name} encoder=none`."
        )
    return make(given[None])


def _factor(text):
    if text == DENSE:
        return text
    value = arguments.number(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(
            f"must be a positive number, or none. Received: {text}."
        )
    return value
