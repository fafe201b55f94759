"""Run prompts through a bundle, layer by layer, and keep what quantizing needs to know of every activation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export import names
from mmm_export.calibration.calibration_file import (
    Calibration,
    TensorRange,
    arrays_from_statistics,
    range_from_statistics,
    write_calibration,
)
from mmm_export.calibration.linears import Source
from mmm_export.calibration.prompts import Sample, data_sha256, samples_from_prompts
from mmm_export.calibration.segments import Decoder, Embedder, Segment
from mmm_export.calibration.statistics import PHASES, Statistics
from mmm_export.errors import CalibrationError, OptionError
from mmm_export.manifest import Manifest
from mmm_export.output import output_folder
from mmm_export.progress import Progress
from mmm_export.prompt_file import read_prompts
from mmm_export.text import Tokenizer

Array = NDArray[Any]

ROWS = 256  # tokens kept whole of each activation, to measure choices on
STEP_SHARE = 0.25  # of them at least so many from decode steps, whose activations differ
_IMAGE, _TEXT, _STEP = range(len(PHASES))


@dataclass(frozen=True)
class CollectOptions:
    """What to run.

    Attributes:
        samples: lines of the data to use, from the first.
        chunk_tokens: prompts are read in chunks of so many tokens, as a session does.
        step_tokens: where a line has no answer, the last tokens of its prompt that are read one by one in its place.
        threads: to compute with; None for one a core.
    """

    samples: int = 128
    chunk_tokens: int = 512
    step_tokens: int = 8
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("chunk_tokens", self.chunk_tokens)):
            if value < 1:
                raise OptionError(f"{name} is too small", found=str(value), wanted="at least 1")


class Stream:
    """The hidden states of all samples between two layers, in a file, and how each sample is cut into calls."""

    def __init__(self, folder: Path, samples: Sequence[Sample], hidden: int, dtype: Any, image_token: int) -> None:
        self.samples = samples
        self.starts = np.cumsum([0, *(len(sample.input_ids) for sample in samples)])
        shape = (int(self.starts[-1]), hidden)
        self.hidden = np.memmap(folder / "hidden", dtype, "w+", shape=shape)
        ids = np.concatenate([sample.input_ids for sample in samples])
        self.phases = np.where(ids == image_token, _IMAGE, _TEXT).astype(np.int8)
        for start, sample in zip(self.starts, samples, strict=False):
            self.phases[start + sample.prompt_tokens : start + len(sample.input_ids)] = _STEP

    def calls(self, sample: int, chunk_tokens: int) -> Iterator[slice]:
        """Tokens of each call: the prompt in chunks, then one by one."""
        start, end = int(self.starts[sample]), int(self.starts[sample + 1])
        read = start + self.samples[sample].prompt_tokens
        for begin in range(start, read, chunk_tokens):
            yield slice(begin, min(begin + chunk_tokens, read))
        for position in range(read, end):
            yield slice(position, position + 1)

    def chosen_rows(self, eligible: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mark the tokens that are kept whole, among the `eligible` positions; the same for the same samples."""
        draw = np.random.default_rng(0)
        steps = eligible[self.phases[eligible] == _STEP]
        first = draw.permutation(steps)[: int(ROWS * STEP_SHARE)]
        others = draw.permutation(np.setdiff1d(eligible, first))[: ROWS - len(first)]
        marked = np.zeros(len(self.phases), np.bool_)
        marked[first] = marked[others] = True
        return marked


def load_samples(folder: Path, manifest: Manifest, data: Path, options: CollectOptions) -> tuple[list[Sample], str]:
    """Read and encode the prompts; also their hash.

    Raises:
        CalibrationError: a line cannot be used, or is longer than the KV cache.
        BundleError, TokenizerError: the bundle has no tokenizer, or a damaged one.
    """
    prompts = read_prompts(data, options.samples)
    tokenizer = Tokenizer.from_folder(folder)
    encoded = samples_from_prompts(prompts, data, manifest.model, tokenizer, step_tokens=options.step_tokens)
    samples = list(encoded)
    if manifest.max_tokens:
        for sample in samples:
            if len(sample.input_ids) > manifest.max_tokens:
                raise CalibrationError(
                    f"{sample.label} of {data} does not fit into the KV cache",
                    found=f"{len(sample.input_ids)} tokens",
                    wanted=f"at most {manifest.max_tokens}",
                    hint="remove the line, or export with a larger --max-tokens",
                )
    return samples, data_sha256(prompts)


def embed_samples(folder: Path, manifest: Manifest, samples: Sequence[Sample], scratch: Path) -> Stream:
    """Input embeddings of all samples."""
    embedder = Embedder(folder, manifest)
    dtype = np.float16 if manifest.dtype == "fp16" else np.float32
    stream = Stream(scratch, samples, manifest.model.hidden_size, dtype, manifest.model.image_token_id)
    for sample, start in zip(samples, stream.starts, strict=False):
        stream.hidden[start : start + len(sample.input_ids)] = embedder.embed(sample.input_ids, sample.pixel_values)
    return stream


def collect(
    folder: Path,
    manifest: Manifest,
    data: Path,
    target: Path,
    options: CollectOptions,
    *,
    force: bool,
    progress: Progress,
) -> Calibration:
    """Run the prompts and write a calibration folder; see `calibration_file`.

    Memory holds one layer and one chunk; the hidden states between layers lie in a temporary file.

    Raises:
        CalibrationError: the prompts cannot be used, or an activation is NaN, infinite or always 0.
        OutputError: `target` cannot be written.
    """
    samples, data_hash = load_samples(folder, manifest, data, options)
    marker = names.CALIBRATION_FILE
    with (
        output_folder(target, force=force, marker=marker, protect=(folder,)) as out,
        tempfile.TemporaryDirectory() as tmp,
    ):
        with progress.stage("embed prompts"):
            stream = embed_samples(folder, manifest, samples, Path(tmp))
        decoder = Decoder(folder, manifest)
        arrays: dict[str, Array] = {}
        tensors: list[TensorRange] = []
        with progress.stage("measure layers", decoder.segments * stream.hidden.nbytes) as advance:
            for index in range(decoder.segments):
                sources = [source for source in decoder.sources if source.layer == index]
                segment = decoder.open(index, [source.name for source in sources], threads=options.threads)
                seen = _observe(segment, stream, sources, options.chunk_tokens, is_head=index == manifest.model.layers)
                del segment
                for source in sources:
                    _check_constant(source, seen[source.name])
                    linears = tuple(linear.name for linear in source.linears)
                    tensors.append(range_from_statistics(source.name, linears, seen[source.name]))
                    arrays |= arrays_from_statistics(source.name, seen[source.name])
                advance(stream.hidden.nbytes)
        return write_calibration(
            out,
            arrays,
            tuple(tensors),
            bundle_sha256=manifest.model_sha256,
            data_sha256=data_hash,
            samples=len(samples),
            tokens={phase: int((stream.phases == i).sum()) for i, phase in enumerate(PHASES)},
            chunk_tokens=options.chunk_tokens,
        )


def _observe(
    segment: Segment, stream: Stream, sources: Sequence[Source], chunk_tokens: int, *, is_head: bool
) -> dict[str, Statistics]:
    """Run one segment over all samples; update the hidden states in place, unless it is the head."""
    seen = {source.name: Statistics(source.channels) for source in sources}
    count = len(stream.samples)
    calls = [list(stream.calls(sample, chunk_tokens)) for sample in range(count)]
    ends = np.array([call.stop - 1 for sample in calls for call in sample], np.int64)
    chosen = stream.chosen_rows(ends if is_head else np.arange(len(stream.phases), dtype=np.int64))
    for sample in range(count):
        segment.reset()
        for call in calls[sample]:
            output, taps = segment.run(np.asarray(stream.hidden[call]))
            for source in sources:
                values = taps[source.name].astype(np.float32, copy=False)
                # The head reads the last token of each call alone, unless the bundle gives logits for all.
                at = np.arange(call.stop - len(values), call.stop)
                if not np.isfinite(values).all():
                    raise _not_finite(source, stream.samples[sample])
                seen[source.name].add(values, stream.phases[at], is_first_half=sample < (count + 1) // 2)
                seen[source.name].rows.append(values[chosen[at]])
            if not is_head:
                stream.hidden[call] = output
    return seen


def _not_finite(source: Source, sample: Sample) -> CalibrationError:
    return CalibrationError(
        f"the input of {source.linears[0].name} (tensor {source.name}, layer {source.layer}) is not finite",
        found=f"NaN or infinity with {sample.label}",
        wanted="finite numbers",
        hint="the model or this prompt is broken; export with --dtype fp32 or bf16 if float16 overflows",
    )


def _check_constant(source: Source, seen: Statistics) -> None:
    if seen.largest == 0.0:
        raise CalibrationError(
            f"the input of {source.linears[0].name} (tensor {source.name}, layer {source.layer}) is always 0",
            found=f"{seen.count} tokens, all 0",
            wanted="an activation with a range",
            hint="calibrate on prompts like those in use; if the model is made so, it cannot be quantized there",
        )
