"""Copies the text embedding out of a bundle as raw rows, which a runtime maps into memory: no engine is needed to look rows up."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mmm_export import names
from mmm_export.engine_manifest import EmbeddingTable
from mmm_export.errors import EngineError

_BLOCK_BYTES = 32 << 20


def write_embedding_table(bundle: Path, folder: Path) -> EmbeddingTable:
    """Write names.EMBEDDING_TABLE into `folder`, (rows, width) unpadded. Raises EngineError if the graph has no such table."""
    model = ir.load(bundle / names.EMBEDDING_FILE)
    tables = [
        node.inputs[0].const_value
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[1] in model.graph.inputs and node.inputs[0] is not None
    ]
    if len(tables) != 1 or tables[0] is None:
        raise EngineError(
            f"{names.EMBEDDING_FILE} of the bundle cannot be read as a table",
            found=f"{len(tables)} look-ups of token ids",
            wanted="one",
            hint="export the bundle again with this version",
        )
    table = tables[0]
    rows, width = (int(size) for size in table.shape.numpy())
    target = folder / names.EMBEDDING_TABLE
    with target.open("wb") as stream:
        if isinstance(table, ir.ExternalTensor):
            with (bundle / table.location).open("rb") as source:
                source.seek(table.offset or 0)
                left = rows * width * int(table.dtype.itemsize)
                while left:
                    block = source.read(min(left, _BLOCK_BYTES))
                    if not block:
                        raise EngineError(f"{bundle / table.location} ends early", hint="export the bundle again")
                    left -= stream.write(block)
        else:
            stream.write(table.tobytes())
    dtype = "bfloat16" if table.dtype == ir.DataType.BFLOAT16 else str(table.dtype.numpy())
    return EmbeddingTable(target.name, dtype, rows, width)
