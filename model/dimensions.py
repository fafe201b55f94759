"""Sizes of the model from the shapes of its tensors; a size that config.json states otherwise is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mmm_export.errors import CheckpointError
from mmm_export.model import tensors
from mmm_export.model.config import Section
from mmm_export.model.stored import StoredTensor
from mmm_export.model.tensor_check import missing_tensor
from mmm_export.spec import LayerKind

Stored = Mapping[str, StoredTensor]
CONV_WIDTHS = (2, 3, 4)  # what the short convolution has kernels for


Sizes = list[tuple[int, str]]  # a size and the tensor that has it
Keys = tuple[tuple[str, str], ...]  # (part, key) of config.json that state a size
_HIDDEN: Keys = (
    ("embedding_config", "hidden_size"),
    ("embedding_config", "llm_hidden_size"),
    ("llm_config", "hidden_size"),
)
_INNER: Keys = (("embedding_config", "intermediate_size"), ("llm_config", "intermediate_size"))
_VOCAB: Keys = (("embedding_config", "llm_vocab_size"), ("llm_config", "vocab_size"))
_HEADS: Keys = (("embedding_config", "num_attention_heads"), ("llm_config", "num_attention_heads"))
_KV_HEADS: Keys = (("embedding_config", "num_key_value_heads"), ("llm_config", "num_key_value_heads"))
_HEAD_DIM: Keys = (("embedding_config", "head_dim"), ("llm_config", "head_dim"))


@dataclass(frozen=True)
class Dimensions:
    """Sizes shared by all layers. `conv_width` of a model without mamba2 layers is that of the released ones, 2."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    conv_width: int


def dimensions(config: Section, stored: Stored, layers: Mapping[str, LayerKind], head: str) -> Dimensions:
    """Derive all sizes.

    Each is what most tensors agree on, so that one misshaped tensor does not mislead the rest and is later named.

    Args:
        config: config.json.
        stored: all tensors.
        layers: kind of every layer by name prefix.
        head: name of the tensor of the output head.

    Raises:
        CheckpointError: tensors contradict config.json or each other, or a size is not supported.
    """
    mamba = [prefix for prefix, kind in layers.items() if kind == "mamba2"]
    attention = [prefix for prefix, kind in layers.items() if kind == "mha"]
    sizes = _Sizes(config, stored)
    hidden = sizes.agreed(_HIDDEN, sizes.along(0, 1, layers, "attention_norm.weight"))
    inner = sizes.agreed(_INNER, sizes.along(0, 2, layers, "feed_forward.w1.weight"))
    vocab = sizes.agreed(_VOCAB, sizes.along(0, 2, [""], tensors.TEXT_TABLE) + sizes.along(0, 2, [""], head))
    conv_width = 2
    if mamba:
        heads = sizes.agreed(
            _HEADS, sizes.along(0, 1, mamba, "attention.A_log_bias") + sizes.along(0, 1, mamba, "attention.dt_bias")
        )
        head_dim = sizes.agreed(_HEAD_DIM, sizes.along(0, 1, mamba, "attention.g_norm_swish_gate.weight"))
        rows = sizes.along(0, 3, mamba, "attention.conv1d.weight")
        conv_width = sizes.agreed((), sizes.along(2, 3, mamba, "attention.conv1d.weight"))
    else:
        heads = _stated_heads(config)
        width = sizes.agreed((), sizes.along(1, 2, attention, "attention.wo.weight"))
        if width % heads:
            raise CheckpointError(
                f"{config.file.name}: num_attention_heads disagrees with the tensors",
                found=f"{heads} heads",
                wanted=f"a divisor of {width}, the width of {attention[0]}attention.wo.weight",
            )
        head_dim = sizes.agreed(_HEAD_DIM, [(width // heads, attention[0] + "attention.wo.weight")])
        rows = sizes.along(0, 2, attention, tensors.ATTENTION_PROJECTION)
    kv_sizes = [((count // head_dim - heads) // 2, name) for count, name in rows if _fits(count, heads, head_dim)]
    if not kv_sizes:
        count, name = rows[0]
        raise CheckpointError(
            f"tensor {name} does not fit the heads of the model",
            found=f"{count} rows",
            wanted=f"({heads} heads + 2 * kv heads) * {head_dim}",
        )
    kv_heads = sizes.agreed(_KV_HEADS, kv_sizes)
    if heads % kv_heads:
        raise CheckpointError(
            "the heads cannot share the key-value heads evenly",
            found=f"{heads} heads over {kv_heads} key-value heads",
            wanted="a number of heads that is a multiple of the key-value heads",
        )
    if conv_width not in CONV_WIDTHS:
        raise CheckpointError(
            f"convolution width {conv_width} is not supported",
            found=f"{mamba[0]}attention.conv1d.weight of width {conv_width}",
            wanted=f"one of {', '.join(map(str, CONV_WIDTHS))}",
        )
    return Dimensions(hidden, heads, kv_heads, head_dim, inner, vocab, conv_width)


def _fits(rows: int, heads: int, head_dim: int) -> bool:
    """Whether rows = (heads + 2 * kv) * head_dim for some kv of at least 1."""
    return rows % head_dim == 0 and rows // head_dim > heads and (rows // head_dim - heads) % 2 == 0


def _stated(config: Section, keys: Keys) -> Iterator[tuple[str, int]]:
    """Yield where and what config.json states of a size."""
    for part, key in keys:
        section = config.section(part)
        value = section.integer(key) if section else None
        if section is not None and value is not None:
            yield section.where(key), value


def _stated_heads(config: Section) -> int:
    """Read the number of heads of a model whose tensors cannot tell it: one without mamba2 layers."""
    stated = [*_stated(config, _HEADS)]
    if not stated:
        raise CheckpointError(
            f"{config.file.name} does not state num_attention_heads",
            found="neither embedding_config nor llm_config has it, and all layers are attention layers",
            wanted="the number of heads: shapes of attention layers do not tell it",
        )
    (where, heads), *others = stated
    for other, count in others:
        if count != heads:
            raise CheckpointError(
                f"{other} disagrees with {where}", found=f"{count} heads", wanted=f"{heads} heads in both stacks"
            )
    return heads


class _Sizes:
    """Sizes that tensors have, compared with those that config.json states."""

    def __init__(self, config: Section, stored: Stored) -> None:
        self._config = config
        self._stored = stored

    def along(self, axis: int, rank: int, prefixes: Iterable[str], name: str) -> Sizes:
        """Give the size of tensor `name` along an axis, and the tensor's full name, for every layer that stores it.

        Raises:
            CheckpointError: no layer stores it with `rank` dimensions.
        """
        names = [prefix + name for prefix in prefixes]
        present = [self._stored[name] for name in names if name in self._stored]
        if not present:
            raise missing_tensor(names[0])
        sizes = [(tensor.shape[axis], tensor.name) for tensor in present if len(tensor.shape) == rank]
        if not sizes:
            raise CheckpointError(
                f"tensor {present[0].name} has the wrong shape",
                found=str(list(present[0].shape)),
                wanted=f"{rank} dimensions",
            )
        return sizes

    def agreed(self, keys: Keys, sizes: Sizes) -> int:
        """Settle a size: what most tensors have; on a tie, what config.json states.

        Raises:
            CheckpointError: config.json states another one, or it is 0.
        """
        stated = [*_stated(self._config, keys)]
        votes = Counter(size for size, _ in sizes)
        size = max(votes, key=lambda size: (votes[size], size in {value for _, value in stated}))
        tensor = next(name for candidate, name in sizes if candidate == size)
        if size < 1:
            raise CheckpointError(f"tensor {tensor} is empty", found="size 0", wanted="at least 1")
        for where, value in stated:
            if value != size:
                raise CheckpointError(
                    f"{where} disagrees with the tensors",
                    found=f"{value} in {self._config.file.name}",
                    wanted=f"{size}, as tensor {tensor} has it",
                    hint="config.json may be of another checkpoint",
                )
        return size
