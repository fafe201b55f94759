"""From a bundle and its calibration to a quantized bundle."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from pathlib import Path

import onnx
import onnx_ir as ir

import mmm_export
from mmm_export import names
from mmm_export.calibration.calibration_file import Calibration, Samples, read_calibration
from mmm_export.calibration.linears import find_linears, find_sources
from mmm_export.calibration.plan import Plan, QuantizeOptions, make_plan
from mmm_export.calibration.rewrite import Rewriter
from mmm_export.calibration.segments import EXACT_SETTINGS
from mmm_export.calibration.weight_file import stored_bytes, write_weights
from mmm_export.calibration.weights import Weights
from mmm_export.errors import BundleError, CalibrationError, OptionError
from mmm_export.fusion import fuse_products
from mmm_export.manifest import Manifest, Quantization, check_files, file_info, read_manifest, write_manifest
from mmm_export.output import output_folder
from mmm_export.progress import Progress, SilentProgress


def open_source(folder: Path, options: QuantizeOptions, progress: Progress) -> Manifest:
    """Check a bundle that is to be quantized.

    Raises:
        BundleError: it is damaged, quantized already, or shares its weights by hard links.
        OptionError: its number format is none that the consumer runs.
    """
    manifest = read_manifest(folder)
    if manifest.quantization is not None:
        raise BundleError(
            f"{folder} is quantized already",
            found=f"format {manifest.quantization.format}",
            wanted="a bundle as mmm-export onnx writes it",
            hint="give the bundle that it was made from",
        )
    if manifest.needs_kernels:
        raise BundleError(
            f"{folder} was exported with --fuse, whose products cannot be quantized any more",
            wanted="a bundle as mmm-export onnx writes it without --fuse",
            hint="--for onnxruntime-cuda fuses what it quantizes",
        )
    if options.consumer == "onnxruntime-cuda" and manifest.dtype == "fp32":
        raise OptionError(
            f"{folder} holds an fp32 model, whose products have no kernel on a GPU",
            found="dtype fp32, --for onnxruntime-cuda",
            wanted="fp16 or bf16",
            hint="export it again: mmm-export onnx CHECKPOINT -o BUNDLE --dtype bf16",
        )
    if manifest.dtype == "bf16" and options.consumer in ("onnxruntime", "reference"):
        raise OptionError(
            f"{folder} holds a bf16 model, which ONNX Runtime cannot compute on a CPU, quantized or not",
            found=f"dtype bf16, --for {options.consumer}",
            wanted="fp32 or fp16, or --for tensorrt or tensorrt-rtx",
            hint="export it again: mmm-export onnx CHECKPOINT -o BUNDLE --dtype fp16",
        )
    with progress.stage("check files"):
        check_files(folder, manifest)
    data = folder / (names.DECODER_FILE + names.WEIGHTS_SUFFIX)
    if data.exists() and data.stat().st_nlink > 1:  # onnx-ir takes it for an attempt to read a file from elsewhere
        raise BundleError(
            f"{data} cannot be read",
            found=f"{data.stat().st_nlink} hard links to it, which the reader of weights refuses",
            wanted="a file of its own",
            hint=f"copy the bundle and give the copy: cp -r {folder} COPY",
        )
    return manifest


def check_calibration(calibration: Calibration, manifest: Manifest, path: Path) -> None:
    """Raise CalibrationError unless the calibration is of this bundle."""
    if calibration.bundle_sha256 != manifest.model_sha256:
        raise CalibrationError(
            f"{path} is the calibration of another bundle",
            found=f"model sha256 {calibration.bundle_sha256[:16]}",
            wanted=f"{manifest.model_sha256[:16]}",
            hint="calibrate again with --data; number format and graph form belong to a bundle's identity",
        )


def plan_from_calibration(
    model: ir.Model,
    manifest: Manifest,
    calibration: Calibration,
    folder: Path,
    options: QuantizeOptions,
    progress: Progress,
) -> Plan:
    """Choose factors and scales; `folder` holds the samples."""
    linears = find_linears(model, manifest.model)
    total = sum(linear.rows * linear.columns for linear in linears)
    with progress.stage("choose ranges", 4 * total) as advance:
        return make_plan(
            find_sources(model, linears, manifest.model),
            Weights(model),
            calibration,
            Samples(folder, calibration),
            options,
            manifest.dtype,
            lambda done: advance(4 * done),
        )


def quantize_bundle(
    bundle: Path,
    calibration_file: Path,
    output: Path,
    options: QuantizeOptions,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a quantized bundle; it appears under its name when it is complete.

    Args:
        bundle: as `mmm-export onnx` wrote it.
        calibration_file: its calibration.json, with the samples beside it.
        output: the folder to write.
        options: format and form.
        force: replace a bundle that is there.
        progress: told what is being done.

    Raises:
        BundleError, CalibrationError, OptionError: an input cannot be used.
        OutputError: `output` exists, or the disk is too small.
    """
    progress = progress or SilentProgress()
    manifest = open_source(bundle, options, progress)
    calibration = read_calibration(calibration_file)
    check_calibration(calibration, manifest, calibration_file)
    model = ir.load(bundle / names.DECODER_FILE)
    plan = plan_from_calibration(model, manifest, calibration, calibration_file.parent, options, progress)
    source = ir.load(bundle / names.DECODER_FILE)  # whose weights are read while `model` gets others
    Rewriter(model, Weights(source), options.consumer, manifest.dtype).apply(plan)
    is_fused = options.consumer == "onnxruntime-cuda"
    if is_fused:
        fuse_products(model)
    copied = [name for name in manifest.files if not name.startswith(names.DECODER_FILE)]
    needed = stored_bytes(model) + sum(manifest.files[name].bytes for name in copied)
    with output_folder(output, force=force, needed_bytes=needed, protect=(bundle, calibration_file.parent)) as folder:
        data = folder / (names.DECODER_FILE + names.WEIGHTS_SUFFIX)
        files = {name: manifest.files[name] for name in copied}
        with progress.stage(f"write weights of {names.DECODER_FILE}", stored_bytes(model)) as advance:
            files[data.name] = write_weights(model, data, advance)
        with progress.stage("write and check the bundle"):
            ir.save(model, folder / names.DECODER_FILE)
            onnx.checker.check_model(folder / names.DECODER_FILE, full_check=False)
            for name in copied:
                shutil.copyfile(bundle / name, folder / name)
            shutil.copyfile(calibration_file, folder / names.CALIBRATION_FILE)
            for name in (names.DECODER_FILE, names.CALIBRATION_FILE):
                files[name] = file_info(folder / name)
        made = dataclasses.replace(
            manifest,
            opset=model.opset_imports[""],
            files=files,
            tools={
                **manifest.tools,
                "mmm-export": mmm_export.__version__,
                "onnx-ir": importlib.metadata.version("onnx-ir"),
            },
            needs_kernels=is_fused,
            quantization=Quantization(
                format=options.format,
                method=options.method if options.format == "int8" else "minmax",
                smooth=str(options.smooth) if options.format in ("int8", "int4") else "none",
                consumer=options.consumer,
                source_model_sha256=manifest.model_sha256,
                calibration_sha256=files[names.CALIBRATION_FILE].sha256,
                left=plan.left,
                session=_session_settings(options),
            ),
        )
        write_manifest(folder, made)
    return made


def _session_settings(options: QuantizeOptions) -> dict[str, str]:
    """With these ONNX Runtime computes what the graph says.

    For ONNX Runtime itself int8 pairs may be fused, without the 16-bit sums that saturate on processors without VNNI; FP8 pairs
    must not be, since it has no fused operator for them and refuses the graph.
    """
    if options.consumer != "onnxruntime" or options.format == "fp8":
        return dict(EXACT_SETTINGS)
    return {"session.x64quantprecision": "1"}
