"""From config.json and the stored tensors to a ModelSpec, with every contradiction found on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from mmm_export import names
from mmm_export.errors import CheckpointError
from mmm_export.model import tensors
from mmm_export.model.config import Section
from mmm_export.model.dimensions import dimensions
from mmm_export.model.image_geometry import vision_spec
from mmm_export.model.layer_kinds import layer_kinds
from mmm_export.model.stored import StoredTensor
from mmm_export.model.tensor_check import check_tensors, check_variants
from mmm_export.spec import LayerKind, ModelSpec, RopeSpec, StackSpec

RopePolicy = Literal["ignore", "teacher"]

# transformers leaves out of config.json what equals a default of the configuration class; these are those defaults.
NORM_EPS = {"embedding_config": 1e-5, "llm_config": 1e-6}
MAX_POSITIONS = {"embedding_config": 4096, "llm_config": 2048}
ROPE_THETA = 10000.0
IMAGE_TOKEN_ID = 92546
ARCHITECTURES = ("mmMambaChatModel", "InternVLChatModel", "HoVLEChatModel")  # the student's class, and its teacher's


@dataclass(frozen=True)
class Described:
    """A model as its checkpoint describes it. `head` names the tensor of the output head."""

    spec: ModelSpec
    head: str
    findings: tuple[str, ...]


def model_spec(config: Section, stored: Mapping[str, StoredTensor], rope_scaling: RopePolicy) -> Described:
    """Read the model's description, and check every tensor against it.

    Args:
        config: config.json, known to have both parts.
        stored: all tensors.
        rope_scaling: "ignore" runs attention without RoPE scaling, as the released hybrid does; "teacher" follows
            `rope_scaling` of config.json, as its teacher does.

    Raises:
        CheckpointError: not a supported model, or config.json and tensors contradict each other.
    """
    findings: list[str] = []
    embedding = cast(Section, config.section("embedding_config"))
    llm = cast(Section, config.section("llm_config"))
    _check_architecture(config, embedding, llm, findings)
    check_variants(stored.keys())
    head = _head(config, llm, stored, findings)
    layers = layer_kinds(config, stored)
    findings.extend(layers.findings)
    kinds: dict[str, LayerKind] = {f"{tensors.EMBEDDING_LAYERS}.{i}.": k for i, k in enumerate(layers.embedding)}
    kinds |= {f"{tensors.LLM_LAYERS}.{i}.": kind for i, kind in enumerate(layers.llm)}
    sizes = dimensions(config, stored, kinds, head)
    stated_id = embedding.integer("img_context_token_id", least=0)
    image_token_id = IMAGE_TOKEN_ID if stated_id is None else stated_id
    if stated_id is None:
        findings.append(f"{embedding.where('img_context_token_id')} is absent; {IMAGE_TOKEN_ID} is taken, as released")
    spec = ModelSpec(
        hidden_size=sizes.hidden_size,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        vocab_size=sizes.vocab_size,
        special_tokens=_special_tokens(embedding, stored, findings),
        conv_width=sizes.conv_width,
        embedding=_stack(embedding, layers.embedding, "embedding_config", rope_scaling, findings),
        llm=_stack(llm, layers.llm, "llm_config", rope_scaling, findings),
        vision=vision_spec(config, stored, sizes.hidden_size, findings),
        image_token_id=image_token_id,
        normalize_embedding=bool(config.flag("normalize_encoder_output") or embedding.flag("normalize_encoder_output")),
        template=config.text("template") or names.TEMPLATE,
    )
    if spec.attention_layers and spec.head_dim % 2:
        raise CheckpointError(
            "the attention layers cannot be rotated",
            found=f"head_dim {spec.head_dim}",
            wanted="an even head_dim, since rotary embedding turns pairs",
        )
    rows = spec.vocab_size + spec.special_tokens
    if image_token_id >= rows:
        raise CheckpointError(
            f"{embedding.where('img_context_token_id')} is outside the vocabulary",
            found=f"id {image_token_id}" + ("" if stated_id is not None else ", the default, since it is not stated"),
            wanted=f"0 to {rows - 1}",
        )
    if spec.template != names.TEMPLATE:
        findings.append(f"template {spec.template!r:.40} is not known: prompts will be refused, token ids still work")
    unused = {tensors.CLASS_POSITION, tensors.LLM_TABLE}
    for prefix, kind in layers.leftovers:
        unused |= {prefix + name for name in tensors.mixer_shapes(spec, kind)}
    check_tensors(stored, tensors.required_shapes(spec, head=head), unused)
    return Described(spec, head, tuple(findings))


def _check_architecture(config: Section, embedding: Section, llm: Section, findings: list[str]) -> None:
    names = config.texts("architectures")
    if not names:
        findings.append("config.json does not state architectures; the tensors fit mmMamba")
    elif not set(names) & set(ARCHITECTURES):
        findings.append(f"architecture {', '.join(names)!r:.60} is not known; the tensors fit {ARCHITECTURES[0]}")
    if embedding.flag("use_ls"):
        raise CheckpointError(
            f"{embedding.where('use_ls')} is true, which is not supported",
            found="layers with a learned scale of their own",
            wanted="false, as in the released models: their reference refuses anything else",
        )
    for section in (embedding, llm):
        activation = section.text("hidden_act")
        if activation not in (None, "silu", "swish"):
            raise CheckpointError(
                f"{section.where('hidden_act')} is not supported", found=f"{activation!r:.40}", wanted="'silu'"
            )


def _head(config: Section, llm: Section, stored: Mapping[str, StoredTensor], findings: list[str]) -> str:
    """Name the tensor that is the output head: its own, or the LLM's token table when the two are tied."""
    stated = llm.flag("tie_word_embeddings")
    tied = config.flag("tie_word_embeddings") if stated is None else stated
    if tensors.HEAD in stored or not tied:
        if tied and tensors.LLM_TABLE in stored:
            findings.append(f"tie_word_embeddings is true, but {tensors.HEAD} is stored and used")
        return tensors.HEAD
    return tensors.LLM_TABLE


def _special_tokens(embedding: Section, stored: Mapping[str, StoredTensor], findings: list[str]) -> int:
    """Rows of the text embedding beyond the vocabulary."""
    special_maps = embedding.section("special_token_maps")
    stated = len(special_maps.data) if special_maps else 0
    table = stored.get(tensors.SPECIAL_TABLE)
    if table is None or len(table.shape) != 2:
        return stated  # a table that should be there is then reported as missing or misshaped
    rows = table.shape[0]
    if stated and stated != rows:
        raise CheckpointError(
            f"{embedding.where('special_token_maps')} disagrees with the tensors",
            found=f"{stated} special tokens",
            wanted=f"{rows}, the rows of {tensors.SPECIAL_TABLE}",
        )
    if not stated:
        findings.append(
            f"{embedding.where('special_token_maps')} is empty, but {tensors.SPECIAL_TABLE} has {rows} rows"
        )
    return rows


def _stack(
    section: Section, kinds: tuple[LayerKind, ...], part: str, policy: RopePolicy, findings: list[str]
) -> StackSpec:
    eps = section.number("rms_norm_eps")
    if eps is None:
        eps = NORM_EPS[part]
        findings.append(f"{section.where('rms_norm_eps')} is absent; {eps:g} is taken, the default of its class")
    return StackSpec(kinds, eps, _rope(section, "mha" in kinds, part, policy, findings))


def _rope(section: Section, used: bool, part: str, policy: RopePolicy, findings: list[str]) -> RopeSpec:
    theta = section.number("rope_theta")
    if theta is None and used:
        findings.append(f"{section.where('rope_theta')} is absent; {ROPE_THETA:g} is taken, the default of its class")
    theta = theta or ROPE_THETA
    scaling = section.section("rope_scaling")
    if scaling is None:
        return RopeSpec(theta)
    if policy == "ignore":
        if used:
            findings.append(f"{section.where('rope_scaling')} is ignored, as the released models do")
        return RopeSpec(theta)
    kind = scaling.text("type") or scaling.text("rope_type")
    factor = scaling.number("factor")
    if kind not in ("linear", "dynamic") or factor is None:
        raise CheckpointError(
            f"{section.where('rope_scaling')} cannot be followed",
            found=f"type {kind!r:.40}, factor {factor}",
            wanted="type 'linear' or 'dynamic', and a factor",
            hint="without the teacher's policy it is ignored, as the released models do",
        )
    tokens = section.integer("max_position_embeddings")
    if tokens is None:
        tokens = MAX_POSITIONS[part]
        findings.append(f"{section.where('max_position_embeddings')} is absent; {tokens} is taken, its class's default")
    return RopeSpec(theta, "linear" if kind == "linear" else "dynamic", factor, tokens)
