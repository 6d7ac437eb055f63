"""
Title: Upcycling T5
Author: keras_upcycle contributors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Turn an encoder-decoder into mixtures of experts, and train on.
Accelerator: None
"""

"""
## Introduction

*Sparse Upcycling* ([Komatsuzaki et al.,
2022](https://arxiv.org/abs/2212.05055)) turns a trained dense Transformer into
a mixture of experts and trains on. Its language half is about T5: every other
feed-forward block of the encoder and of the decoder becomes a mixture.

The two stacks are not alike. The encoder sees whole texts, so its experts may
choose their tokens (*Expert Choice*). The decoder must not look ahead, so its
tokens choose their experts (*Top-K*). And texts have different lengths: padding
must not take an expert's time, nor change what real tokens get.

This guide makes a small T5 that translates numbers into words, upcycles it,
checks the result, trains on with `fit`, generates, and saves a preset. A look
at the paper's own recipe comes last.
"""

"""
## Setup
"""

import keras_upcycle

# isort: split
import io
import tempfile

import keras
import keras_hub
import numpy as np
import sentencepiece

WIDTH = 48
NUM_BLOCKS = 2
NUM_EXPERTS = 4
TRAIN_EXAMPLES = 2048
TEST_EXAMPLES = 256
DENSE_EPOCHS = 12
MORE_EPOCHS = 4
BATCH_SIZE = 64
LENGTH = 24

keras.utils.set_random_seed(0)

"""
## Data

`"3 0 7"` becomes `"three zero seven"`, with one to six digits: short and long
examples in one batch.
"""

WORDS = "zero one two three four five six seven eight nine".split()


def make_examples(count, seed):
    rng = np.random.default_rng(seed)
    sources, targets = [], []
    for size in rng.integers(1, 7, size=count):
        digits = rng.integers(10, size=size)
        sources.append("say: " + " ".join(map(str, digits)))
        targets.append(" ".join(WORDS[digit] for digit in digits))
    return {"encoder_text": sources, "decoder_text": targets}


train = make_examples(TRAIN_EXAMPLES, seed=1)
test = make_examples(TEST_EXAMPLES, seed=2)

"""
## A dense T5

With a network, `keras_hub.models.T5Seq2SeqLM.from_preset("t5_1.1_base")` would
do. Here a tokenizer is trained on the texts, with T5's numbers for padding, end
and unknown, and a small model on top of it. Its shape is that of T5 1.1: gated
feed-forward blocks, and embeddings of its own for the output.
"""

written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(train["encoder_text"] + train["decoder_text"]),
    model_writer=written,
    vocab_size=64,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
)
tokenizer = keras_hub.tokenizers.T5Tokenizer(proto=written.getvalue())
preprocessor = keras_hub.models.T5Seq2SeqLMPreprocessor(
    tokenizer,
    encoder_sequence_length=LENGTH,
    decoder_sequence_length=LENGTH,
)
dense = keras_hub.models.T5Seq2SeqLM(
    keras_hub.models.T5Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=NUM_BLOCKS,
        num_heads=4,
        hidden_dim=WIDTH,
        intermediate_dim=2 * WIDTH,
        activation="gelu",
        dropout=0.0,
        tie_embedding_weights=False,
    ),
    preprocessor=preprocessor,
)
dense.compile(
    optimizer=keras.optimizers.Adam(2e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    weighted_metrics=["accuracy"],
    sampler="greedy",
)
dense.fit(train, batch_size=BATCH_SIZE, epochs=DENSE_EPOCHS, verbose=2)

"""
## What it will cost

An encoder token and a decoder token do not cost the same, and a model may have
more of one than of the other. With `sequence_length` the estimate counts a
whole example. It builds nothing: a function that makes a model will do in the
model's place, for models that do not fit here.
"""

estimate = keras_upcycle.estimate_upcycle(
    dense, NUM_EXPERTS, sequence_length={"encoder": LENGTH, "decoder": LENGTH}
)
print(estimate)


def t5_1_1_xl():
    return keras_hub.models.T5Backbone(
        vocabulary_size=32128,
        num_layers=24,
        num_heads=32,
        hidden_dim=2048,
        intermediate_dim=5120,
        key_value_dim=64,
        tie_embedding_weights=False,
    )


XL_EXPERTS = 32
xl = keras_upcycle.estimate_upcycle(t5_1_1_xl, num_experts=XL_EXPERTS)
print(f"T5 1.1 XL: {xl.dense_params:,} parameters become {xl.total_params:,}.")

"""
## The conversion

`router` and `layers` take one setting for both stacks or one for each; a stack
given `None` stays dense. By default every other block from the second becomes
sparse: Expert Choice with `capacity_factor=2` in the encoder, Top-2 in the
decoder, which drops nothing at inference.
"""

sparse = keras_upcycle.upcycle_model(dense, NUM_EXPERTS, seed=0)
print({stack: list(of) for stack, of in sparse.backbone.experts.items()})

"""
## Checking the result

`verify_upcycle` compares at real positions and leaves padding out. In the
decoder every token meets two experts, and gets what the dense block gives. In
the encoder a token that no expert chose goes by on the residual branch, which
is where the two models differ at first.
"""

inputs, _, _ = preprocessor({name: texts[:64] for name, texts in test.items()})
inputs = {name: np.asarray(value) for name, value in inputs.items()}
print(keras_upcycle.verify_upcycle(dense, sparse, inputs))

"""
If generation is to be the dense model's, token for token, until training
begins, route the encoder by Top-K too, or leave it dense:
"""

prompts = test["encoder_text"][:4]
same = keras_upcycle.upcycle_model(
    dense, NUM_EXPERTS, layers={"encoder": None}, seed=0
)
print("Same words:", same.generate(prompts) == dense.generate(prompts))

"""
## Training on

The padding mask reaches the routers, and the sample weights of KerasHub's
preprocessor leave padding out of the loss. The decoder's load-balancing loss is
added by its layers. Besides arrays and `tf.data`, a sparse task takes a
`keras.utils.PyDataset`.
"""

print("Before:", sparse.evaluate(test, verbose=0, return_dict=True))
sparse.fit(
    train,
    batch_size=BATCH_SIZE,
    epochs=MORE_EPOCHS,
    validation_data=(test,),
    verbose=2,
)
for prompt, answer in zip(prompts, sparse.generate(prompts), strict=True):
    print(f"{prompt!r}: {answer!r}")

"""
## Saving and loading

A preset holds the backbone, the tokenizer and the preprocessor, with its
sequence lengths. Import `keras_upcycle` wherever it is loaded.
"""

with tempfile.TemporaryDirectory() as folder:
    sparse.save_to_preset(folder)
    loaded = keras_hub.models.Seq2SeqLM.from_preset(folder)

outputs = [
    keras.ops.convert_to_numpy(model(inputs, training=False))
    for model in (sparse, loaded)
]
print("Largest difference:", float(np.max(np.abs(outputs[0] - outputs[1]))))

"""
## The paper's recipe

For language the paper did not renormalise the combine weights. That pays later,
it found, and costs at the start: the sparse blocks begin with a fraction of the
dense block's output. The recipe sets what the paper set, and says where each
value comes from.
"""

print(keras_upcycle.get_recipe("sparse_upcycling"))
paper = keras_upcycle.upcycle_model(
    dense, NUM_EXPERTS, recipe="sparse_upcycling", seed=0
)
print(keras_upcycle.verify_upcycle(dense, paper, inputs))

"""
## Good to know

- bfloat16 works throughout, with routers in float32; to train, take
  `mixed_bfloat16`, whose weights are float32. float16 does not: T5's
  attention mask overflows it, in the dense model too.
- A prediction depends neither on the padding nor on the other examples of its
  batch, and in the decoder not on later tokens.
- Token ids outside the vocabulary give NaN on JAX without an error.
  `verify_upcycle` and the conversion look for them.
- `examples/t5_pretrain.py` pretrains with span corruption and compares dense
  and sparse training at equal compute.
"""
