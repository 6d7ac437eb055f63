"""A Vision Transformer that learns CIFAR-10."""

import functools

import keras
import keras_hub
import numpy as np
import tfds_reader
from augmentation import crop_and_flip

import keras_upcycle as ku
from keras_upcycle.demo import training
from studies.plans import Plan
from studies.setting import TEST, VALIDATION, Setting

CLASSES = 10
VALIDATED = 5000  # of the training images, to choose by


class Images(Setting):
    """Images, cropped and mirrored anew at every step, and a KerasHub ViT.

    Args:
        splits: `"train"`, `VALIDATION` and `TEST`: uint8 images `(N, height,
            width, 3)` and integer labels `(N,)`.
        plan: What is compared.
        batch_size: Images of a step.
        patch_size: Pixels.
    """

    name = "CIFAR-10"

    def __init__(
        self,
        splits: dict[str, tuple[np.ndarray, np.ndarray]],
        plan: Plan,
        batch_size: int = 64,
        patch_size: int = 8,
    ):
        self.splits = splits
        self.plan = plan
        self.batch_size = batch_size
        self.patch_size = patch_size
        self.shape = splits[TEST][0].shape[1:]

    def build(self):
        backbone = keras_hub.models.ViTBackbone(
            image_shape=self.shape,
            patch_size=self.patch_size,
            num_layers=self.plan.blocks,
            num_heads=2,
            hidden_dim=self.plan.width,
            mlp_dim=4 * self.plan.width,
            # A class token would make 17 of 16 tokens: experts take whole
            # ones, so Expert Choice would cost more than it says.
            use_class_token=False,
        )
        return keras_hub.models.ViTImageClassifier(
            backbone, num_classes=CLASSES, pooling="gap"
        )

    def batches(self, seed, start):
        images, labels = self.splits["train"]

        def draw(rng):
            at = rng.integers(len(labels), size=self.batch_size)
            return scaled(crop_and_flip(images[at], rng)), labels[at]

        return training.drawn(draw, seed, start)

    def held_out(self, model, part):
        images, labels = self.splits[part]
        return training.evaluate(model, scaled(images), labels)

    @functools.cached_property
    def _reference(self):
        return self.build()

    def estimate(self, **options):
        return ku.estimate_upcycle(
            self._reference.backbone, sequence_length=self.tokens, **options
        )

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        height, width = (side // self.patch_size for side in self.shape[:2])
        return height * width

    def uncounted_flops(self):
        """Scores, and the head, which takes an image and not a token."""
        scores = 4 * self.plan.blocks * self.tokens**2 * self.plan.width
        return scores + 2 * self.plan.width * CLASSES

    def fingerprint(self):
        return (
            f"cifar10-{len(self.splits['train'][1])}-{self.patch_size}-"
            f"{self.plan.width}x{self.plan.blocks}"
        )

    def measured(self, model, arm, seed):
        """The paper's 10-shot probe of the frozen features."""
        features = keras.Model(
            model.backbone.input, model.backbone.output, name="features"
        )
        train, test = (
            (scaled(images), labels)
            for images, labels in (self.splits["train"], self.splits[TEST])
        )
        found = ku.few_shot_probe(
            train, test, model=features, draws=20, seed=seed, batch_size=256
        )
        return {"ten_shot": found.mean}


def read(data_dir: str | None = None) -> dict:
    """TFDS's `cifar10`; the last of its training images are to choose by.

    Args:
        data_dir: Folder that holds it; `None` downloads it.

    Raises:
        OSError: If it cannot be read.
        ImportError: If TensorFlow Datasets is missing.
    """
    train, test = (
        (found["image"], found["label"].astype("int32"))
        for found in (
            tfds_reader.load("cifar10", split, data_dir)
            for split in ("train", "test")
        )
    )
    return {
        "train": tuple(part[:-VALIDATED] for part in train),
        VALIDATION: tuple(part[-VALIDATED:] for part in train),
        TEST: test,
    }


def scaled(images: np.ndarray) -> np.ndarray:
    """float32 from -1 to 1."""
    return images.astype("float32") / 127.5 - 1.0
