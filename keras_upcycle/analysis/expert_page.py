"""A text, each token coloured by the expert that processed it: an HTML page."""

import colorsys
import html
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_upcycle import atomic_files, checks
from keras_upcycle.errors import UpcycleError
from keras_upcycle.layers.call_context import record_calls
from keras_upcycle.layers.moe_layers import named_mixtures
from keras_upcycle.types import TokenChoice

_IDS = ("token_ids", "encoder_token_ids")
_MASKS = ("padding_mask", "encoder_padding_mask")
_STYLE = """
body { font: 16px/1.9 system-ui, sans-serif; margin: 2rem; max-width: 60rem; }
h2 { font-size: 1rem; margin: 2rem 0 .4rem; font-weight: 600; }
span { color: #111; padding: .15rem .1rem; border-radius: .2rem; }
p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.legend span { margin-right: .3rem; padding: .1rem .5rem; }
.none { background: #eee; }
small { color: #555; }
"""


def plot_expert_tokens(
    model: keras.Model,
    text: str,
    path: str | os.PathLike,
    *,
    inputs: Mapping[str, Any] | None = None,
    tokens: Sequence[str] | None = None,
) -> None:
    """Writes a page with a text, coloured by expert, once for each block.

    A token has the colour of the expert whose output weighs most; resting the
    pointer on it shows all that processed it, with their weights. Grey is what
    no expert took. The page is one file and needs no network.

    Args:
        model: A Keras model, sparse: a task of KerasHub with a preprocessor, or
            any other with `inputs` and `tokens`.
        text: String, which the task's tokenizer splits; the title of the page
            where `tokens` are given.
        path: Path of the page, that ends in `.html`. A file that is there is
            replaced.
        inputs: Mapping of arrays, one example as the model is called on, for a
            model without a preprocessor. Defaults to `None`.
        tokens: List of strings, one for each position of `inputs`. Defaults to
            `None`.

    Raises:
        TypeError: For what is no text, path or model.
        ValueError: If `path` ends otherwise; for one of `inputs` and `tokens`
            without the other; if no block saw as many tokens.
        UpcycleError: If the model has no preprocessor and `inputs` are missing.

    Example:
        >>> import pathlib, tempfile
        >>> model = keras.Sequential([
        ...     keras.Input((3, 8)), keras_upcycle.MoEFeedForward(4, 16),
        ... ])
        >>> page = pathlib.Path(tempfile.mkdtemp()) / "experts.html"
        >>> plot_expert_tokens(
        ...     model, "three words", page,
        ...     inputs=np.ones((1, 3, 8)), tokens=["a", "b", "c"],
        ... )
        >>> page.read_text().count("<span title=")
        3
    """
    mixtures = named_mixtures(model)
    checks.check_instance("text", text, str, "a text")
    checks.check_instance("path", path, str | os.PathLike, "a path")
    if not str(path).endswith(".html"):
        raise ValueError(
            f"`path` must end in .html. Received: path={str(path)!r}."
        )
    if (inputs is None) != (tokens is None):
        raise ValueError(
            "`inputs` and `tokens` go together: one string for each position. "
            f"Received: {'inputs' if tokens is None else 'tokens'} alone."
        )
    if inputs is None:
        inputs, tokens = _read(model, text)
    assert tokens is not None  # noqa: S101  for the type checker
    names = {id(layer): name for name, layer in mixtures.items()}
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    with record_calls() as calls:
        model(inputs, training=False)
    sections, seen = [], set()
    for call in calls:
        found = _experts(call)
        name = names[id(call.layer)]
        if len(found) < len(tokens) or name in seen:
            continue
        seen.add(name)
        sections.append(_section(name, call.layer.num_experts, tokens, found))
    if not sections:
        lengths = sorted({len(_experts(call)) for call in calls})
        raise ValueError(
            "`tokens` must be those of some block. Received: "
            f"{len(tokens)} tokens, where blocks saw {lengths}."
        )
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(text[:80])}</title><style>{_STYLE}</style>"
        "</head><body>\n<small>A token has the colour of the expert that "
        "weighs most; rest the pointer on it for all of them.</small>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )

    def write(draft):
        draft.write_text(page, encoding="utf-8")

    atomic_files.replace(path, write)


def _read(model, text):
    """One example of a task, and its tokens; padding is left out of both."""
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is None:
        raise UpcycleError(
            "A model must have a preprocessor with a tokenizer to read a text. "
            f"Received: {model.name!r} without. Pass `inputs` and `tokens`."
        )
    read = getattr(preprocessor, "generate_preprocess", preprocessor)
    batch = read([text])
    if isinstance(batch, tuple):
        batch = batch[0]
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    ids = next(arrays[name] for name in _IDS if name in arrays)[0]
    mask = next((arrays[name] for name in _MASKS if name in arrays), None)
    count = len(ids) if mask is None else int(mask[0].astype(bool).sum())
    words = [_word(tokenizer, int(number)) for number in ids[:count]]
    return arrays, words


def _word(tokenizer, number):
    word = tokenizer.id_to_token(number)
    # How SentencePiece and pairs of bytes write a space.
    return str(word).replace("\u2581", " ").replace("\u0120", " ")


def _experts(call):
    """For each position of the first example: `(expert, weight)`s."""
    routing = call.routing
    found: list[list[tuple[int, float]]] = [[] for _ in range(call.num_tokens)]
    if isinstance(routing, TokenChoice):
        experts = ops.convert_to_numpy(routing.experts)
        weights = ops.convert_to_numpy(routing.weights)
        experts = experts.reshape(-1, experts.shape[-1])
        weights = weights.reshape(-1, weights.shape[-1])
        for place in range(min(len(found), len(experts))):
            found[place] = [
                (int(expert), float(weight))
                for expert, weight in zip(
                    experts[place], weights[place], strict=True
                )
                if expert < call.layer.num_experts
            ]
    else:
        chosen = ops.convert_to_numpy(routing.tokens)
        active = ops.convert_to_numpy(routing.active)
        weights = ops.convert_to_numpy(routing.weights)
        for group, expert, slot in zip(*np.nonzero(active), strict=True):
            at = group * call.length + chosen[group, expert, slot]
            if at < len(found):
                weight = float(weights[group, expert, slot])
                found[at].append((int(expert), weight))
    # The first example's alone.
    return found[: len(found) // call.inputs.shape[0]]


def _section(name, num_experts, tokens, found):
    colours = [_colour(number, num_experts) for number in range(num_experts)]
    legend = "".join(
        f"<span style='background:{colour}'>{number}</span>"
        for number, colour in enumerate(colours)
    )
    words = "".join(
        _span(word, each, colours)
        for word, each in zip(tokens, found, strict=False)
    )
    return (
        f"<h2>{html.escape(name)}</h2>\n<p class='legend'>{legend}</p>\n"
        f"<p>{words}</p>"
    )


def _span(word, experts, colours):
    text = html.escape(word)
    if not experts:
        return f"<span title='no expert' class='none'>{text}</span>"
    ordered = sorted(experts, key=lambda each: -each[1])
    said = ", ".join(f"expert {e}: {weight:.2f}" for e, weight in ordered)
    return (
        f"<span title='{said}' style='background:{colours[ordered[0][0]]}'>"
        f"{text}</span>"
    )


def _colour(number, count):
    """Light, so that black text is read on all; far apart for neighbours."""
    hue = number / count
    light = 0.78 if number % 2 else 0.68
    rgb = colorsys.hls_to_rgb(hue, light, 0.75)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
