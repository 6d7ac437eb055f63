"""The data and the dense model of a study that the command line names."""

import argparse

import text_corpus

from keras_upcycle.demo import language_model, sources
from studies import causal_lm, data, images
from studies.language import Language
from studies.plans import Plan
from studies.setting import Setting
from studies.spans import Spans


def open_setting(args: argparse.Namespace, plan: Plan) -> Setting:
    """Reads the data of a study.

    Args:
        args: Of `python -m studies`.
        plan: What is compared.

    Raises:
        OSError: If they cannot be read.
        ImportError: If TensorFlow Datasets is needed and missing.
        ValueError: If they are not what the study learns.
    """
    return OPENED[plan.study](args, plan)


def _language(args, plan):
    shape = language_model.Shape(
        num_layers=plan.blocks,
        hidden_dim=plan.width,
        intermediate_dim=4 * plan.width,
    )
    return Language(_text(args), shape, plan, args.batch_size)


def _images(args, plan):
    return images.Images(images.read(args.data_dir), plan, args.batch_size)


def _spans(args, plan):
    if args.sst2:
        parts = [text_corpus.read_labelled(path) for path in args.sst2]
    elif args.no_sst2:
        parts = None
    else:
        parts = [
            text_corpus.sst2(split, args.data_dir)
            for split in ("train", "validation")
        ]
    return Spans(_text(args), plan, parts, args.batch_size)


def _causal_lm(args, plan):
    return causal_lm.CausalLM(_text(args), plan, args.batch_size)


def _text(args) -> sources.Text:
    return data.read(args.data, args.data_dir)


OPENED = {
    "language": _language,
    "newer": _language,
    **dict.fromkeys(causal_lm.BACKBONES, _causal_lm),
    "images": _images,
    "spans": _spans,
}
