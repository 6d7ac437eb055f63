"""A T5 that fills holes in a text, byte by byte, and then answers SST-2."""

import functools
import zlib

import keras_hub
import numpy as np
import span_corruption

import keras_upcycle as ku
from keras_upcycle.demo import comparison, sources, training
from studies.plans import Plan
from studies.setting import Setting

CHUNK = 64  # bytes of a text
FIRST = 2  # id of byte 0, after padding and </s>
SENTINELS = FIRST + sources.VOCABULARY + np.arange(8)
VOCABULARY = int(SENTINELS[-1]) + 1
HEADS = 2
SENTENCE = 96  # bytes, at most
ANSWERS = FIRST + np.frombuffer(b"np", "uint8").astype("int32")
TUNED = {"rates": (1e-3, 3e-3), "steps": 1000, "batch_size": 32}
CHOSEN_BY = 10  # every so many sentences are held out to choose the rate by

Sentences = tuple[list[str], np.ndarray]


class Spans(Setting):
    """Windows of a text with holes, and a T5 1.1.

    Args:
        text: What is learned.
        plan: What is compared.
        sst2: Sentences and labels to tune on, and to test on; `None` leaves
            that out.
        batch_size: Windows of a step.
    """

    def __init__(
        self,
        text: sources.Text,
        plan: Plan,
        sst2: tuple[Sentences, Sentences] | None = None,
        batch_size: int = 64,
    ):
        self.text = text
        self.plan = plan
        self.batch_size = batch_size
        self.name = text.name
        inputs, targets = span_corruption.lengths(CHUNK)
        self.lengths = {"encoder": inputs + 1, "decoder": targets + 1}
        self.sst2 = sst2 and sst2_parts(*sst2)

    def build(self):
        width = self.plan.width
        backbone = keras_hub.models.T5Backbone(
            vocabulary_size=VOCABULARY,
            num_layers=self.plan.blocks,
            num_heads=HEADS,
            hidden_dim=width,
            intermediate_dim=4 * width,
            dropout=0.0,
            activation="gelu",
            use_gated_activation=True,
            tie_embedding_weights=False,
        )
        # KerasHub draws both tables of size 1, for an optimizer that steps in
        # proportion to a weight. Adam's steps are of one size.
        table = backbone.token_embedding
        for weights in (table.embeddings, table.reverse_embeddings):
            weights.assign(weights * width**-0.5)
        return keras_hub.models.T5Seq2SeqLM(backbone)

    def batches(self, seed, start):
        tokens = self.text.train

        def draw(rng):
            at = rng.integers(0, len(tokens) - CHUNK, self.batch_size)
            return self._corrupted(tokens, at, rng)

        return training.drawn(draw, seed, start)

    def held_out(self, model, part):
        return training.evaluate(model, *self._held_out(part))

    @functools.cache  # noqa: B019  a setting lives as long as its study
    def _held_out(self, part):
        tokens = getattr(self.text, part)
        at = np.linspace(0, len(tokens) - CHUNK - 1, training.TESTED)
        return self._corrupted(
            tokens, at.astype("int64"), np.random.default_rng(0)
        )

    def _corrupted(self, tokens, at, rng):
        texts = FIRST + tokens[at[:, None] + np.arange(CHUNK)].astype("int32")
        pairs = [
            span_corruption.corrupt(text, SENTINELS, rng) for text in texts
        ]
        # Every window has as many holes and dropped bytes: no padding.
        x, labels, _ = span_corruption.pack(
            *zip(*pairs, strict=True), *self.lengths.values(), VOCABULARY
        )
        return x, labels

    @functools.cached_property
    def _reference(self):
        return self.build()

    def estimate(self, **options):
        return ku.estimate_upcycle(
            self._reference, sequence_length=self.lengths, **options
        )

    def uncounted_flops(self):
        source, target = self.lengths.values()
        pairs = source**2 + target**2 + source * target
        # KerasHub's T5 has the same inner width as its tokens have.
        return 4 * self.plan.blocks * pairs * self.plan.width

    def fingerprint(self):
        return (
            f"spans-{zlib.crc32(self.text.train.tobytes()):x}-"
            f"{self.plan.width}x{self.plan.blocks}"
        )

    def tuned(self, model, seed, callbacks):
        """SST-2, at the rate that is best on a part of its sentences."""
        if self.sst2 is None:
            raise ValueError(
                "SST-2 is needed for this part. Received: --no-sst2. Pass "
                "--sst2 TRAIN TEST, or neither to load TFDS's glue/sst2."
            )
        state = training.get_state(model)
        found = {}
        for rate in TUNED["rates"]:
            training.set_state(model, state)
            comparison.restart_optimizer(model)
            outcome = training.fit(
                model,
                self._sentences(seed),
                training.rates(rate, TUNED["steps"], cool_down=1.0),
                callbacks=callbacks,
            )
            chosen_by, test = (
                training.evaluate(model, *self.sst2[part])
                for part in ("chosen_by", "test")
            )
            found[rate] = {
                "held_out": test["cross_entropy"],
                "accuracy": test["accuracy"],
                "validation": chosen_by["accuracy"],
                "train": outcome.train,
                "seconds": outcome.seconds,
                "steps": TUNED["steps"],
                "tuned_at": rate,
            }
        return max(found.values(), key=lambda row: row["validation"])

    def _sentences(self, seed):
        x, labels = self.sst2["train"]
        rng = np.random.default_rng(seed)
        while True:
            at = rng.integers(len(labels), size=TUNED["batch_size"])
            yield {name: part[at] for name, part in x.items()}, labels[at]


def sst2_parts(train: Sentences, test: Sentences) -> dict[str, tuple]:
    """Sentences and answers as a `Spans` model takes them, in three parts.

    Args:
        train: Sentences and labels, 0 or 1.
        test: The same.
    """
    x, labels = answered(*train)
    kept = np.arange(len(labels)) % CHOSEN_BY > 0
    return {
        "train": ({k: v[kept] for k, v in x.items()}, labels[kept]),
        "chosen_by": ({k: v[~kept] for k, v in x.items()}, labels[~kept]),
        "test": answered(*test),
    }


def answered(
    sentences: list[str], labels: np.ndarray
) -> tuple[dict, np.ndarray]:
    """Bytes of sentences, and one byte to answer: `n` or `p`.

    Args:
        sentences: Texts, cut after `SENTENCE` bytes.
        labels: 0 or 1 for each.
    """
    texts = [
        FIRST
        + np.minimum(
            np.frombuffer(sentence.encode()[: SENTENCE - 1], "uint8"),
            sources.OTHER,
        ).astype("int32")
        for sentence in sentences
    ]
    # The answer's own </s> is left out: it says nothing.
    x, _, _ = span_corruption.pack(
        texts, [[]] * len(texts), SENTENCE, 1, VOCABULARY
    )
    return x, ANSWERS[labels][:, None]
