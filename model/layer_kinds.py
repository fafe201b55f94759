"""How many layers each stack has and of which kind: the tensors decide, labels are checked against them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from mmm_export.errors import CheckpointError
from mmm_export.model import tensors
from mmm_export.model.config import Section
from mmm_export.model.stored import StoredTensor
from mmm_export.spec import LAYER_KINDS, LayerKind

LABELS = "layers_block_type"
Stored = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class LayerKinds:
    """Kinds of the layers of both stacks. `leftovers`: prefix and kind of mixers that are stored but not used."""

    embedding: tuple[LayerKind, ...]
    llm: tuple[LayerKind, ...]
    leftovers: tuple[tuple[str, LayerKind], ...]
    findings: tuple[str, ...]


def layer_kinds(config: Section, stored: Stored) -> LayerKinds:
    """Decide the kind of every layer.

    A layer that stores one mixer is of that kind, whatever its label says; with both, the label decides.

    Raises:
        CheckpointError: a layer is missing, has no mixer, has both and no label, or has a label that is no kind.
    """
    findings: list[str] = []
    leftovers: list[tuple[str, LayerKind]] = []
    counts = [
        _layer_count(cast(Section, config.section(part)), prefix, stored)
        for part, prefix in (("embedding_config", tensors.EMBEDDING_LAYERS), ("llm_config", tensors.LLM_LAYERS))
    ]
    labels = _labels(config, counts[0], counts[1], findings)
    prefixes = [f"{tensors.EMBEDDING_LAYERS}.{i}." for i in range(counts[0])]
    prefixes += [f"{tensors.LLM_LAYERS}.{i}." for i in range(counts[1])]
    if not prefixes:
        raise CheckpointError(
            f"{config.file.parent} has no layers", found="no tensor of any layer", wanted=f"{tensors.LLM_LAYERS}.0.*"
        )
    kinds: list[LayerKind] = []
    mislabelled: list[str] = []
    for prefix, label in zip(prefixes, labels, strict=True):
        present = [kind for kind in LAYER_KINDS if prefix + tensors.FIRST_PROJECTION[kind] in stored]
        kind = _kind(prefix, present, label)
        if len(present) == 2:
            other = next(kind_ for kind_ in LAYER_KINDS if kind_ != kind)
            leftovers.append((prefix, other))
        if label is not None and kind != label:
            mislabelled.append(f"{prefix[:-1]} is {kind}, not {label}")
        kinds.append(kind)
    if mislabelled:
        findings.append(f"{LABELS} is wrong about {len(mislabelled)} layers; the tensors decide: {_some(mislabelled)}")
    if leftovers:
        both = [f"{prefix[:-1]}" for prefix, _ in leftovers]
        findings.append(f"{len(both)} layers store both mixers; {LABELS} decides which runs: {_some(both)}")
    return LayerKinds(tuple(kinds[: counts[0]]), tuple(kinds[counts[0] :]), tuple(leftovers), tuple(findings))


def _kind(prefix: str, present: Sequence[LayerKind], label: LayerKind | None) -> LayerKind:
    if len(present) == 1:
        return present[0]
    both = " and ".join(prefix + tensors.FIRST_PROJECTION[kind] for kind in LAYER_KINDS)
    if not present:
        wanted = prefix + tensors.FIRST_PROJECTION[label] if label else both.replace(" and ", " or ")
        raise CheckpointError(f"tensor {wanted} is missing", found=f"no mixer in layer {prefix[:-1]}", wanted=wanted)
    if label is None:
        raise CheckpointError(
            f"layer {prefix[:-1]} has two mixers and no label",
            found=both,
            wanted=f"one of them, or {LABELS} in config.json to choose",
        )
    return label


def _layer_count(section: Section, prefix: str, stored: Stored) -> int:
    """Count the layers of a stack; every index from 0 must be there, as many as config.json states if it does."""
    pattern = re.compile(re.escape(prefix) + r"\.(0|[1-9][0-9]{0,8})\.")
    found = sorted({int(match[1]) for name in stored if (match := pattern.match(name))})
    stated = section.integer("num_hidden_layers", least=0)
    gap = next((i for i, index in enumerate(found) if i != index), len(found))
    wanted = stated if stated is not None else (found[-1] + 1 if found else 1)
    if gap < wanted:
        raise CheckpointError(
            f"tensor {prefix}.{gap}.attention_norm.weight is missing",
            found=f"{len(found)} layers under {prefix}",
            wanted=f"{wanted} layers" + (f", as {section.where('num_hidden_layers')} says" if stated else ""),
            hint="a shard may be missing, or config.json may be of another checkpoint",
        )
    if found and found[-1] >= wanted:
        name = next(name for name in sorted(stored) if name.startswith(f"{prefix}.{found[-1]}."))
        raise CheckpointError(
            f"tensor {name} belongs to no layer",
            found=f"{len(found)} layers under {prefix}",
            wanted=f"{wanted} layers, as {section.where('num_hidden_layers')} says",
        )
    return wanted


def _labels(config: Section, embedding: int, llm: int, findings: list[str]) -> list[LayerKind | None]:
    """Read the labels of all layers, None where config.json has none; adds to `findings` what cannot be used."""
    parts: list[list[LayerKind | None]] = []
    for section, count in ((config.section("embedding_config"), embedding), (config.section("llm_config"), llm)):
        labels = _known(cast(Section, section), findings, count)
        parts.append(labels or [None] * count)
    top = _known(config, findings, embedding + llm)
    nested = parts[0] + parts[1]
    return [label or top_label for label, top_label in zip(nested, top or [None] * len(nested), strict=True)]


def _known(section: Section, findings: list[str], count: int) -> list[LayerKind | None] | None:
    labels = section.texts(LABELS)
    if labels is None:
        return None
    for i, label in enumerate(labels):
        if label not in LAYER_KINDS:
            raise CheckpointError(
                f"{section.where(LABELS)} has an unknown layer kind",
                found=f"{label!r:.60} for layer {i}",
                wanted=" or ".join(LAYER_KINDS),
                hint="correct it, or remove layers_block_type: the tensors tell the kinds too",
            )
    if len(labels) != count:
        findings.append(f"{section.where(LABELS)} has {len(labels)} entries for {count} layers and is ignored")
        return None
    return [cast(LayerKind, label) for label in labels]


def _some(items: Iterable[str], most: int = 3) -> str:
    """Join items for a sentence; the first few stand for many."""
    shown = list(items)
    return "; ".join(shown[:most]) + (f"; and {len(shown) - most} more" if len(shown) > most else "")
