"""Makes a full-size bundle with random weights, to time what does not depend on them.

python benchmarks/full_size_bundle.py BUNDLE                     random checkpoint, then mmm-export onnx: minutes, 11 GB of disk
python benchmarks/full_size_bundle.py --strip BUNDLE GRAPHS      graphs, small weights, and samples of the large ones: 4 MB
python benchmarks/full_size_bundle.py --fill GRAPHS BUNDLE       a bundle again, its large weights drawn from the samples: seconds

The last two carry a bundle to a machine that has a GPU but little time.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bundle_weights import StoredWeight, data_file, mapped, stored_weights

from mmm_export import names
from mmm_export.manifest import FileInfo, Manifest, read_manifest, write_manifest

KEPT_BYTES = 64 << 10  # weights up to this size are kept whole: norms, biases, decays
SAMPLED_ITEMS = 4096
TABLE_FILE, KEPT_FILE = "weights.json", "weights.bin"


def export_random(bundle: Path, *, kind: str, dtype: str, fuse: bool, tiny: bool) -> None:
    """Write a checkpoint with random weights and export it."""
    from mmm_export.exporter.bundle import ExportOptions, export_bundle
    from mmm_export.model.testing import full_size_spec, tiny_spec, write_checkpoint
    from mmm_export.progress import console_progress

    checkpoint = bundle.with_name(f"{bundle.name}-checkpoint")
    shutil.rmtree(checkpoint, ignore_errors=True)
    spec = tiny_spec(kinds=kind) if tiny else full_size_spec(kind)  # type: ignore[arg-type]
    write_checkpoint(checkpoint, spec, dtype="bf16")
    options = ExportOptions(dtype=dtype, fuse=fuse)  # type: ignore[arg-type]
    export_bundle(checkpoint, bundle, options, force=True, progress=console_progress())
    shutil.rmtree(checkpoint)


def strip(bundle: Path, graphs: Path) -> None:
    """Write a bundle without its large weights: of each a sample of values stays."""
    graphs.mkdir(parents=True)
    manifest = read_manifest(bundle)
    for name in (names.MANIFEST_FILE, *manifest.files):
        if not name.endswith(names.WEIGHTS_SUFFIX):
            shutil.copyfile(bundle / name, graphs / name)
    kept = bytearray()
    table: dict[str, Any] = {}
    random = np.random.default_rng(0)
    for file in names.GRAPH_FILES:
        weights = stored_weights(bundle / file)
        data = mapped(bundle / file) if weights else np.zeros(0, np.uint8)
        rows = []
        for weight in weights:
            items = data[weight.offset : weight.offset + weight.bytes].reshape(-1, weight.item_bytes)
            if weight.bytes > KEPT_BYTES:
                items = items[np.sort(random.integers(0, len(items), SAMPLED_ITEMS))]
            rows.append({**dataclasses.asdict(weight), "kept": len(kept), "kept_bytes": items.nbytes})
            kept += items.tobytes()
        table[file] = {"bytes": data.nbytes, "weights": rows}
    (graphs / TABLE_FILE).write_text(json.dumps(table), encoding="utf-8")
    (graphs / KEPT_FILE).write_bytes(bytes(kept))


def fill(graphs: Path, bundle: Path, *, device: str, seed: int = 0) -> Manifest:
    """Write a whole bundle from a stripped one; the manifest tells the hashes of the new weights."""
    bundle.mkdir(parents=True)
    table = json.loads((graphs / TABLE_FILE).read_text(encoding="utf-8"))
    kept = np.fromfile(graphs / KEPT_FILE, np.uint8)
    manifest = read_manifest(graphs)
    files = dict(manifest.files)
    for name in files:
        if not name.endswith(names.WEIGHTS_SUFFIX):
            shutil.copyfile(graphs / name, bundle / name)
    for file, part in table.items():
        path = data_file(bundle / file)
        files[path.name] = _filled(path, part, kept, device, seed)
    manifest = dataclasses.replace(manifest, files=files)
    write_manifest(bundle, manifest)
    return manifest


def _filled(path: Path, part: dict[str, Any], kept: np.ndarray[Any, Any], device: str, seed: int) -> FileInfo:
    """Write one data file; drawing, and writing with hashing, go on side by side."""
    import torch

    digest = hashlib.sha256()
    generator = torch.Generator(device).manual_seed(seed)
    position = 0
    with path.open("wb") as stream, ThreadPoolExecutor(1) as pool:

        def put(*parts: Any) -> None:
            for data in parts:
                stream.write(data)
                digest.update(data)

        written: Future[None] | None = None
        for row in part["weights"]:
            begin, size = row.pop("kept"), row.pop("kept_bytes")
            weight = StoredWeight(**{**row, "shape": tuple(row["shape"])})
            values = kept[begin : begin + size].copy()
            if size != weight.bytes:
                sample = torch.from_numpy(values.reshape(-1, weight.item_bytes)).to(device)
                whole = sample.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.item_bytes])
                count = weight.bytes // weight.item_bytes
                places = torch.randint(0, len(sample), (count,), generator=generator, device=device, dtype=torch.int32)
                values = whole.flatten()[places].cpu().numpy()
            if written is not None:
                written.result()
            written = pool.submit(put, bytes(weight.offset - position), values.view(np.uint8).data)
            position = weight.offset + weight.bytes
        if written is not None:
            written.result()
        put(bytes(part["bytes"] - position))
    return FileInfo(part["bytes"], digest.hexdigest())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--strip", action="store_true", help="from a bundle, its graphs")
    parser.add_argument("--fill", action="store_true", help="from the graphs, a bundle")
    parser.add_argument("--kind", choices=["linear", "hybrid", "teacher"], default="linear")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="bf16")
    parser.add_argument("--no-fuse", action="store_true", help="products as plain MatMul nodes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    parser.add_argument("--device", default=None, help="where --fill draws (default: the GPU if there is one)")
    options = parser.parse_args()
    if len(options.folders) != 1 + (options.strip or options.fill) or (options.strip and options.fill):
        parser.error("one folder, or two with --strip or --fill")
    begin = time.perf_counter()
    if options.strip:
        strip(*options.folders)
    elif options.fill:
        import torch

        fill(*options.folders, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        export_random(
            *options.folders, kind=options.kind, dtype=options.dtype, fuse=not options.no_fuse, tiny=options.tiny
        )
    sys.stderr.write(f"{options.folders[-1]}: {time.perf_counter() - begin:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
