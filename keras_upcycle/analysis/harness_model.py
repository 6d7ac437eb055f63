"""The class that `lm_eval` calls; imported only where that is installed."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

# Lengths are rounded up to a multiple: each is a program of its own.
STEP = 64
# Of a task that does not say how much to generate, as the harness's own.
NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """A `CausalLM` and its tokenizer; see `lm_eval_model`.

    Args:
        model: A `keras_hub.models.CausalLM`.
        batch_size: Integer.
        max_length: Integer.
    """

    def __init__(
        self,
        model: keras_hub.models.CausalLM,
        batch_size: int,
        max_length: int,
    ):
        super().__init__()
        self.model = model
        self.batch_size = batch_size
        self.max_length = max_length
        self.words = model.preprocessor.tokenizer
        self._scorer = _scorer(model)

    @property
    def tokenizer_name(self) -> str:
        return type(self.words).__name__

    @property
    def eot_token_id(self) -> int:
        return int(self.words.end_token_id)

    @property
    def prefix_token_id(self) -> int:
        start = getattr(self.words, "start_token_id", None)
        return self.eot_token_id if start is None else int(start)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = bool(
                getattr(self.model.preprocessor, "add_start_token", False)
            )
        found = [int(n) for n in np.asarray(self.words(string)).reshape(-1)]
        start = getattr(self.words, "start_token_id", None)
        if add_special_tokens and start is not None and found[:1] != [start]:
            found = [int(start), *found]
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        for _, _, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    "What is scored must fit the model. Received: "
                    f"{len(continuation)} tokens, and max_length="
                    f"{self.max_length}. Pass a larger `max_length`."
                )
        # Longest first, so that memory runs out at once or never.
        order = sorted(
            range(len(requests)),
            key=lambda n: -len(requests[n][1]) - len(requests[n][2]),
        )
        found: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring")
        for part in _parts(order, self.batch_size):
            pairs = [requests[n][1:] for n in part]
            for n, result in zip(part, self._scored(pairs), strict=True):
                found[n] = result
                if requests[n][0] is not None:
                    self.cache_hook.add_partial(
                        "loglikelihood", requests[n][0], result
                    )
            bar.update(len(part))
        bar.close()
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows, places = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, scored = utils.make_disjoint_window(window)
                windows.append((None, context, scored))
                places.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (score, _) in zip(places, scores, strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial(
                "loglikelihood_rolling", request.args, total
            )
        return totals

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        found: list[Any] = [None] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        for numbers in alike.values():
            settings = _Settings(requests[numbers[0]].args[1], self)
            with self._sampling(settings.sampler) as generate:
                for part in _parts(numbers, self.batch_size):
                    texts = [requests[n].args[0] for n in part]
                    made = self._generated(texts, settings, generate)
                    for n, text in zip(part, made, strict=True):
                        found[n] = text
                        self.cache_hook.add_partial(
                            "generate_until", requests[n].args, text
                        )
                    bar.update(len(part))
        bar.close()
        return found

    def _scored(self, pairs):
        """`(log-likelihood, whether greedy)` of each continuation."""
        rows = [
            (context + scored)[-self.max_length - 1 :]
            for context, scored in pairs
        ]
        length = self._rounded(max(map(len, rows)) - 1)
        shape = (self.batch_size, length)
        seen, mask, targets = (np.zeros(shape, "int32") for _ in range(3))
        for place, row in enumerate(rows):
            count = len(row) - 1
            seen[place, :count] = row[:-1]
            targets[place, :count] = row[1:]
            mask[place, :count] = 1
        mask[len(rows) :, 0] = 1  # rows that fill the batch up
        scores, greedy = keras.Model.predict_on_batch(
            self._scorer,
            {"token_ids": seen, "padding_mask": mask, "targets": targets},
        )
        for place, (row, (_, scored)) in enumerate(
            zip(rows, pairs, strict=True)
        ):
            where = slice(len(row) - 1 - len(scored), len(row) - 1)
            yield (
                float(np.sum(scores[place, where], dtype="float64")),
                bool(np.all(greedy[place, where])),
            )

    @contextlib.contextmanager
    def _sampling(self, sampler):
        """The task's own generation with another sampler, for as long."""
        task = self.model
        before = task.sampler, task.generate_function
        try:
            task.sampler, task.generate_function = sampler, None
            yield task.make_generate_function()
        finally:
            task.sampler, task.generate_function = before

    def _generated(self, texts, settings, generate):
        """What the model goes on with, as far as it is wanted."""
        room = max(self.max_length - settings.new_tokens, 1)
        prompts = [self.tok_encode(text)[-room:] for text in texts]
        prompts = [p or [self.prefix_token_id] for p in prompts]
        length = self._rounded(max(map(len, prompts))) + settings.new_tokens
        length = min(length, self.max_length)
        seen, mask = (
            np.zeros((self.batch_size, length), "int32") for _ in range(2)
        )
        for place in range(self.batch_size):  # the last one fills the batch
            row = prompts[min(place, len(prompts) - 1)]
            seen[place, : len(row)] = row
            mask[place, : len(row)] = 1
        found = generate(
            {"token_ids": seen, "padding_mask": mask},
            stop_token_ids=[self.eot_token_id],
        )
        found = ops.convert_to_numpy(found["token_ids"])
        for prompt, row in zip(prompts, found, strict=False):
            first = len(prompt)
            new = row[first : first + settings.new_tokens].tolist()
            if self.eot_token_id in new:
                new = new[: new.index(self.eot_token_id)]
            text = str(self.words.detokenize(new)) if new else ""
            for stop in settings.until:
                text = text.split(stop)[0]
            yield text

    def _rounded(self, length):
        return min(-(-max(length, 1) // STEP) * STEP, self.max_length)


class _Settings:
    """How a task wants text generated, by the harness's names."""

    def __init__(self, given, harness):
        given = dict(given)
        until = given.pop("until", None) or []
        self.until = [until] if isinstance(until, str) else list(until)
        self.new_tokens = int(given.pop("max_gen_toks", NEW_TOKENS))
        if not 0 < self.new_tokens < harness.max_length:
            raise ValueError(
                "What is generated must fit the model. Received: max_gen_toks="
                f"{self.new_tokens}, and max_length={harness.max_length}. Pass "
                "a larger `max_length`, or gen_kwargs='max_gen_toks=...'."
            )
        samples = given.pop("do_sample", False)
        temperature = float(given.pop("temperature", None) or 0.0)
        top_p, top_k = given.pop("top_p", None), given.pop("top_k", None)
        if given:
            raise ValueError(
                "Known settings of generation are until, max_gen_toks, "
                "do_sample, temperature, top_p and top_k. Received: "
                f"{sorted(given)}."
            )
        samplers = keras_hub.samplers
        if not samples or not temperature:
            self.sampler = samplers.GreedySampler()
        elif top_p is not None:
            self.sampler = samplers.TopPSampler(
                p=float(top_p), k=top_k, temperature=temperature
            )
        elif top_k is not None:
            self.sampler = samplers.TopKSampler(
                k=int(top_k), temperature=temperature
            )
        else:
            self.sampler = samplers.RandomSampler(temperature=temperature)


def _scorer(model):
    """From tokens and the next ones to their log-probabilities `(B, L)`.

    And whether each is the likeliest. On the device: logits would be `V` times
    as much to bring over.
    """
    targets = keras.Input((None,), dtype="int32", name="targets")
    logits = ops.cast(model.output, "float32")
    own = ops.take_along_axis(logits, ops.expand_dims(targets, -1), axis=-1)
    scores = own[..., 0] - ops.logsumexp(logits, axis=-1)
    greedy = ops.equal(ops.cast(ops.argmax(logits, -1), "int32"), targets)
    return keras.Model({**model.input, "targets": targets}, [scores, greedy])


def _parts(numbers, size):
    return [
        numbers[start : start + size] for start in range(0, len(numbers), size)
    ]
