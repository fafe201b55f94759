"""Runs a decoder of a bundle on many prompts at once: right answers, divergence of distributions, drift of states."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.calibration.collect import CollectOptions, load_samples
from mmm_export.calibration.segments import Embedder, open_session
from mmm_export.manifest import Manifest, read_manifest
from mmm_export.text import Tokenizer

Array = NDArray[Any]
BATCH = 50
TURN_END = "<|im_end|>"
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Questions:
    """Prompts as input embeddings (N, T, hidden), padded behind; lengths (N,); the answer's tokens and the end of the turn (N, A),
    -1 where an answer is shorter; embeddings of those (N, A, hidden).
    """

    embeds: Array
    lengths: NDArray[np.int32]
    answers: NDArray[np.int64]
    answer_embeds: Array


@dataclass(frozen=True)
class Outcome:
    """log_probabilities (N, A, vocab), NaN where an answer is shorter; right (N,): whether every greedy token is the answer's."""

    log_probabilities: Array
    right: NDArray[np.bool_]


def questions(bundle: Path, data: Path, count: int) -> Questions:
    """Encode the first prompts of a JSONL file for a bundle."""
    manifest = read_manifest(bundle)
    samples, _ = load_samples(bundle, manifest, data, CollectOptions(samples=count))
    embedder = Embedder(bundle, manifest)
    end = Tokenizer.from_folder(bundle).find(TURN_END)
    rows = [embedder.embed(sample.input_ids, sample.pixel_values) for sample in samples]
    none = np.zeros((0, *samples[0].pixel_values.shape[1:]), np.float32)
    end_row = embedder.embed(np.array([end], np.int64), none)
    answers = [[*map(int, s.input_ids[s.prompt_tokens :]), int(end or 0)] for s in samples]
    longest, width = max(s.prompt_tokens for s in samples), max(map(len, answers))
    hidden = manifest.model.hidden_size
    embeds = np.zeros((len(samples), longest, hidden), rows[0].dtype)
    answer_embeds = np.zeros((len(samples), width, hidden), rows[0].dtype)
    ids = np.full((len(samples), width), -1, np.int64)
    for i, (sample, row, answer) in enumerate(zip(samples, rows, answers, strict=True)):
        embeds[i, : sample.prompt_tokens] = row[: sample.prompt_tokens]
        said = np.concatenate([row[sample.prompt_tokens :], end_row])
        ids[i, : len(answer)], answer_embeds[i, : len(answer)] = answer, said
    return Questions(embeds, np.array([s.prompt_tokens for s in samples], np.int32), ids, answer_embeds)


class DecoderRun:
    """One decoder graph with the states of a batch."""

    def __init__(self, folder: Path, *, graph: Path | None = None) -> None:
        """Open the decoder of a bundle, or another graph of the same inputs."""
        self.manifest: Manifest = read_manifest(folder)
        self.path = path = graph or folder / names.DECODER_FILE
        settings = {} if self.manifest.quantization is None else self.manifest.quantization.session
        self.session: onnxruntime.InferenceSession = open_session(
            path, path.parent, self.manifest, settings={**settings, "session.disable_prepacking": "0"}
        )
        self._inputs = {node.name: node for node in self.session.get_inputs()}
        self._state: dict[str, Array] = {}
        self._past = np.zeros(0, np.int32)

    def begin(self, batch: int) -> None:
        """Forget everything."""
        self._state = {
            name: np.zeros([batch, *node.shape[1:]], _NUMPY[node.type])
            for name, node in self._inputs.items()
            if name.startswith("past.")
        }
        self._past = np.zeros(batch, np.int32)

    def advance(self, embeds: Array, lengths: NDArray[np.int32]) -> Array:
        """Read embeds (B, T, hidden); return logits (B, vocab) of each row's last valid token."""
        kind = _NUMPY[self._inputs[names.INPUTS_EMBEDS].type]
        feeds: dict[str, Array] = {names.INPUTS_EMBEDS: embeds.astype(kind), names.LENGTHS: lengths, **self._state}
        if names.PAST_LENGTHS in self._inputs:
            feeds[names.PAST_LENGTHS] = self._past
        outputs = [names.LOGITS, *(names.present(name) for name in self._state)]
        logits, *states = self.session.run(outputs, feeds)
        self._state = dict(zip(self._state, states, strict=True))
        self._past = self._past + lengths
        return np.asarray(logits[:, -1], np.float64)

    def recurrent_states(self) -> list[Array]:
        """The SSM states, float32."""
        return [value for name, value in self._state.items() if name.endswith(".recurrent")]


def ask(run: DecoderRun, asked: Questions) -> Outcome:
    """Feed every prompt and then its true answer, token by token; greedy decoding says it if every token is the best one."""
    N, A = asked.answers.shape
    found = np.full((N, A, run.manifest.model.vocab_size), np.nan, np.float64)
    for begin in range(0, N, BATCH):
        rows = slice(begin, min(begin + BATCH, N))
        lengths = asked.lengths[rows]
        run.begin(len(lengths))
        found[rows, 0] = _log_softmax(run.advance(asked.embeds[rows, : lengths.max()], lengths))
        for t in range(1, A):
            going = asked.answers[rows, t] >= 0
            logits = run.advance(asked.answer_embeds[rows, t - 1 : t], going.astype(np.int32))
            found[begin + np.flatnonzero(going), t] = _log_softmax(logits)[going]
    best = np.where(np.isnan(found[..., 0]), -1, np.nanargmax(np.nan_to_num(found, nan=-np.inf), axis=-1))
    return Outcome(found, (best == asked.answers).all(1))


def quantized_products(path: Path) -> int:
    """Count the matrix products of a graph, in Q/DQ form, whose weight is quantized."""
    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    held = {tensor.name for tensor in graph.initializer}

    def is_quantized(name: str) -> bool:
        node = makers.get(name)
        if node is not None and node.op_type in ("Cast", "Transpose", "Identity"):
            return is_quantized(node.input[0])
        if node is None or not node.op_type.endswith("DequantizeLinear"):
            return False
        quantizer = makers.get(node.input[0])  # of a weight that is stored as floats, quantized where it is read
        return (node.input[0] if quantizer is None else quantizer.input[0]) in held

    return sum(node.op_type in ("MatMul", "Gemm") and is_quantized(node.input[1]) for node in graph.node)


def divergence(wanted: Outcome, found: Outcome) -> tuple[float, float]:
    """KL(wanted || found) in nats, mean over the tokens of each prompt: its mean over all prompts, and its 99th percentile."""
    p, q = wanted.log_probabilities, found.log_probabilities
    by_prompt = np.nanmean(np.where(np.isnan(p[..., 0]), np.nan, (np.exp(p) * (p - q)).sum(-1)), axis=1)
    return float(by_prompt.mean()), float(np.percentile(by_prompt, 99))


def points_lost(wanted: Outcome, found: Outcome) -> tuple[float, float, float]:
    """Accuracy lost in percentage points and its 95 % interval, of a difference between pairs."""
    n = len(wanted.right)
    only_wanted = int((wanted.right & ~found.right).sum())
    only_found = int((~wanted.right & found.right).sum())
    lost = (only_wanted - only_found) / n
    half = 1.959964 * math.sqrt(max(only_wanted + only_found - n * lost * lost, 0.0)) / n
    return 100 * lost, 100 * (lost - half), 100 * (lost + half)


def states_during(run: DecoderRun, asked: Questions, steps: int, kept: Collection[int]) -> dict[int, list[Array]]:
    """SSM states of eight sequences after the decode steps in `kept`, from 1 to `steps`; each reads prompts one after the other,
    token by token.
    """
    rows = 8
    one = np.ones(rows, np.int32)
    groups = range(0, len(asked.lengths) - rows + 1, rows)
    order = [(i, t) for i in groups for t in range(int(asked.lengths[i : i + rows].min()))]
    if len(order) < steps:
        order *= -(-steps // len(order))
    run.begin(rows)
    found = {}
    for step, (i, t) in enumerate(order[:steps], 1):
        run.advance(asked.embeds[i : i + rows, t : t + 1], one)
        if step in kept:
            found[step] = run.recurrent_states()
    return found


def distance(wanted: Sequence[Array], found: Sequence[Array]) -> float:
    """Relative L2 distance of all states together."""
    wide = [a.astype(np.float64) for a in wanted]
    away = math.sqrt(sum(float(np.square(a - b).sum()) for a, b in zip(wide, found, strict=True)))
    return away / math.sqrt(sum(float(np.square(a).sum()) for a in wide))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
