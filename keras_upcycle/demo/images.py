"""The demo: digits, a small ViT, two continuations, one table."""

import dataclasses
import pathlib

import keras
import keras_hub
import numpy as np

from keras_upcycle import tables
from keras_upcycle.conversion.estimate import estimate_upcycle
from keras_upcycle.conversion.upcycle import upcycle_model
from keras_upcycle.conversion.verify import verify_upcycle
from keras_upcycle.demo import comparison, needed, saved, summary
from keras_upcycle.demo.batches import Data
from keras_upcycle.demo.results import CONTINUED, DENSE, UPCYCLED, Stage
from keras_upcycle.demo.store import write_results
from keras_upcycle.routing.expert_choice_router import ExpertChoiceRouter

NEEDED = {**needed.ALWAYS, "sklearn": "scikit-learn"}
TEST_IMAGES = 597
ABOUT = """\
1,797 handwritten digits of 8x8 pixels. A dense ViT trains to near its \
plateau; then it trains on as it is, and upcycled, at equal compute, from the \
same weights."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of the model and of the training.

    Attributes:
        seeds: Runs, each with data order, weights and routers of its own.
        dense_rounds: Rounds of the dense checkpoint.
        more_rounds: Rounds of each continuation.
        epochs_a_round: Passes over the training images in a round.
        width: Of the ViT's tokens.
        intermediate: Hidden width of a feed-forward.
        blocks: Of the ViT; the last half becomes sparse.
        experts: Of each sparse block.
    """

    seeds: int = 3
    dense_rounds: int = 30
    more_rounds: int = 16
    epochs_a_round: int = 2
    width: int = 32
    intermediate: int = 64
    blocks: int = 4
    experts: int = 8


QUICK = Settings(
    seeds=1, dense_rounds=2, more_rounds=2, epochs_a_round=1, blocks=2
)


def run(output: pathlib.Path, settings: Settings) -> None:
    """Trains, upcycles, compares, and writes everything to a folder.

    Args:
        output: Folder for `results.json`, `curves.png` and `upcycled.keras`.
        settings: A `Settings`.

    Raises:
        ImportError: If a package that only the demo needs is missing.
    """
    needed.check(NEEDED)
    from keras_upcycle.demo import plots
    from keras_upcycle.training import progress

    output.mkdir(parents=True, exist_ok=True)
    data = digits()
    with progress.Reporter() as reporter:
        reporter.line(f"{ABOUT}\nBackend: {keras.backend.backend()}.\n")
        demo = _Demo(settings, data, reporter)
        for seed in range(settings.seeds):
            demo.run_seed(seed)
        same = saved.and_loaded(
            demo.sparse, output / "upcycled.keras", data.test_inputs()
        )
        verdict = summary.verdict(demo.results)
        write_results(
            output / "results.json",
            demo.results,
            settings=dataclasses.asdict(settings),
            estimate=demo.estimate,
            reports=[dataclasses.asdict(report) for report in demo.reports],
            verdict=verdict,
        )
        plots.curves(
            demo.results,
            len(data.train[0]),
            output / "curves.png",
            "Digits: a small ViT trains on, dense or upcycled to "
            f"{settings.experts} experts",
        )
        table = tables.markdown(summary.HEADER, summary.rows(demo.results))
        reporter.line(
            f"\nBefore any sparse training, seed 0. {demo.reports[0]}\n\n"
            f"{table}\n\n{verdict}\n\n{same}\n"
            f"Written to {output}: curves.png, results.json, upcycled.keras."
        )


def digits() -> Data:
    """scikit-learn's digits, split the same way every time."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32")
    train, test, train_labels, test_labels = model_selection.train_test_split(
        images,
        labels.astype("int32"),
        test_size=TEST_IMAGES,
        stratify=labels,
        random_state=0,
    )
    return Data(
        train=(train, train_labels),
        test=(test, test_labels),
        batch=_batch,
    )


def _batch(rows, rng, training):
    images, labels = rows
    images = shift(images, rng) if training else images
    return images / 8.0 - 1.0, labels


def shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves every image by up to one pixel in each direction."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = images.shape[1:3]
    result = np.empty_like(images)
    places = rng.integers(3, size=(len(images), 2))
    for index, (row, column) in enumerate(places):
        result[index] = padded[index, row : row + height, column:][:, :width]
    return result


def dense_model(settings: Settings) -> keras.Model:
    """A KerasHub ViT classifier with random weights, which returns logits."""
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 1),
        patch_size=2,
        num_layers=settings.blocks,
        num_heads=4,
        hidden_dim=settings.width,
        mlp_dim=settings.intermediate,
        use_class_token=False,
    )
    return keras_hub.models.ViTImageClassifier(
        backbone, num_classes=10, pooling="gap"
    )


class _Demo:
    """Three models, each compiled once and used for every seed."""

    def __init__(self, settings, data, reporter):
        self.settings = settings
        self.data = data
        self.reporter = reporter
        self.results = []
        self.reports = []
        self.options = {
            "router": ExpertChoiceRouter(capacity_factor=2.0),
            "layers": "last_half",
        }
        keras.utils.set_random_seed(0)
        self.dense = dense_model(settings)
        self.estimate = estimate_upcycle(
            self.dense, settings.experts, **self.options
        )
        reporter.line(f"{self.estimate}\n")
        batch_size = min(60, len(data.train[0]))
        steps = len(data.train[0]) // batch_size
        self.first = Stage(
            rounds=settings.dense_rounds,
            steps=settings.epochs_a_round * steps,
            batch_size=batch_size,
            learning_rate=3e-3,
        )
        self.more, self.rest = comparison.continued_stages(
            self.first,
            settings.more_rounds,
            self.estimate.flops_ratio,
        )
        self.continued = dense_model(settings)
        self.sparse = self.upcycled(seed=0)
        self.trainers = {
            DENSE: comparison.trainer(self.dense, self.first),
            CONTINUED: comparison.trainer(self.continued, self.more),
            UPCYCLED: comparison.trainer(self.sparse, self.rest),
        }

    def upcycled(self, seed):
        return upcycle_model(
            self.dense, self.settings.experts, seed=seed, **self.options
        )

    def run_seed(self, seed):
        keras.utils.set_random_seed(seed)
        self.dense.set_weights(dense_model(self.settings).get_weights())
        self.stage(DENSE, self.first, seed)
        sparse = self.upcycled(seed)
        images = self.data.test_inputs(64)
        self.reports.append(verify_upcycle(self.dense, sparse, images))
        self.continued.set_weights(self.dense.get_weights())
        self.stage(CONTINUED, self.more, seed)
        self.sparse.set_weights(sparse.get_weights())
        active = self.estimate.active_params
        self.stage(UPCYCLED, self.rest, seed, active)

    def stage(self, name, stage, seed, active=None):
        title = f"seed {seed}, {name}"
        model = self.trainers[name]
        comparison.restart_optimizer(model)
        result = comparison.train(
            model,
            self.data,
            stage,
            name=name,
            seed=seed,
            active_parameters=active,
            callbacks=[self.reporter.callback(title)],
        )
        self.results.append(result)
        self.reporter.line(
            f"{title}: test accuracy {result.final('test_accuracy'):.2%}, "
            f"test loss {result.final('test_loss'):.3f}, {result.steps} steps, "
            f"{result.seconds:.0f} s"
        )
