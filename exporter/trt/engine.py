"""Builds an engine folder from a bundle: whole or not at all, and without building a plan twice."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmm_export
from mmm_export import names
from mmm_export.engine_manifest import (
    EngineManifest,
    Limits,
    PlanInfo,
    PluginInfo,
    ProfileInfo,
    write_engine_manifest,
)
from mmm_export.exporter.trt.builder import Built, Job, build_plan
from mmm_export.exporter.trt.device import platform_name
from mmm_export.exporter.trt.embedding_table import write_embedding_table
from mmm_export.exporter.trt.finished import FinishedPlans
from mmm_export.exporter.trt.layer_listing import layers_by_profile, listing_form
from mmm_export.exporter.trt.libraries import Library, soname_folder
from mmm_export.exporter.trt.lowering import Lowered, lower_graph
from mmm_export.exporter.trt.planning import EnginePlan
from mmm_export.exporter.trt.profiles import decoder_profiles, vision_profiles
from mmm_export.manifest import file_info
from mmm_export.output import output_folder
from mmm_export.progress import Progress, SilentProgress

_WORK = ".work"  # in the unfinished folder: lowered graphs, links to weights


@dataclass(frozen=True)
class PluginChoice:
    """The library that holds the operator, and what it says of itself."""

    path: Path
    info: PluginInfo


NO_PLUGIN = PluginInfo("", False, False, "", 0, "", "", ())


def build_engine(
    plan: EnginePlan,
    output: Path | str,
    plugin: PluginChoice | None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> EngineManifest:
    """Build the folder that `plan` describes.

    It appears under its name only when it is complete. A plan that was finished before an interruption, or lies in a folder that is
    replaced, is used again if nothing that it depends on has changed.

    Args:
        plan: made by `plan_engine`, not in a dry run.
        output: the folder to write.
        plugin: the operator's library; None for a model without Mamba layers.
        force: replace `output`, if it is an engine folder.
        progress: told what is being done.

    Raises:
        EngineError: TensorRT refuses, or ends.
        OutputError: `output` exists and `force` is not set, or the disk is too small.
    """
    progress = progress or SilentProgress()
    if plan.library is None:
        raise ValueError("a dry run has no library to build with")
    if plugin is None and plan.manifest.model.mamba_layers:
        raise ValueError("a model with Mamba layers needs the plugin")
    output = Path(output)
    needed = plan.estimate.engine_bytes + _scratch_bytes(plan, output)
    with output_folder(output, force=force, needed_bytes=needed, protect=(plan.bundle,)) as folder:
        return _Build(plan, plan.library, output, folder, plugin, progress).write()


class _Build:
    """Writes one engine folder."""

    def __init__(
        self,
        plan: EnginePlan,
        library: Library,
        output: Path,
        folder: Path,
        plugin: PluginChoice | None,
        progress: Progress,
    ) -> None:
        self.plan = plan
        self.library = library
        self.folder = folder
        self.plugin = plugin
        self.progress = progress
        self.finished = FinishedPlans(output)
        self.work = folder / _WORK
        self.listings: dict[str, dict[str, Any]] = {}

    def write(self) -> EngineManifest:
        begin = time.perf_counter()
        self.work.mkdir()
        plans = {
            names.DECODER_PLAN: self._plan(names.DECODER_FILE, names.DECODER_PLAN),
            names.VISION_PLAN: self._plan(names.VISION_FILE, names.VISION_PLAN),
        }
        with self.progress.stage("write embedding table, tokenizer and manifest"):
            embedding = write_embedding_table(self.plan.bundle, self.folder)
            for name in (*names.TOKENIZER_FILES, names.GOLDEN_FILE):
                if name in self.plan.manifest.files:
                    shutil.copyfile(self.plan.bundle / name, self.folder / name)
            plugin = self._place_plugin()
            text = json.dumps(self.listings, indent=1) + "\n"
            (self.folder / names.LAYERS_FILE).write_text(text, encoding="utf-8")
            shutil.rmtree(self.work)
            manifest = self._manifest(plans, plugin, embedding, time.perf_counter() - begin)
            write_engine_manifest(self.folder, manifest)
        self.finished.remove()
        return manifest

    def _plan(self, graph: str, plan_name: str) -> PlanInfo:
        plan, sizes = self.plan, self.plan.sizes
        with self.progress.stage(f"lower {graph}"):
            lowered = lower_graph(
                plan.bundle,
                graph,
                self.work,
                plan.operators,
                sizes.max_alloc_bytes,
                sizes.max_tokens if sizes.max_tokens else None,
            )
        is_decoder = graph == names.DECODER_FILE
        profiles: tuple[ProfileInfo, ...] = (
            decoder_profiles(lowered.inputs, sizes.profiles)
            if is_decoder
            else vision_profiles(lowered.inputs, sizes.profiles)
        )
        plugin = self.plugin if is_decoder else None
        options = plan.options
        job = Job(
            onnx=str(lowered.path),
            plan=str(self.folder / plan_name),
            plugin=str(plugin.path.resolve()) if plugin else "",
            embed_plugin=bool(plugin and options.embed_plugin),
            profiles=[
                {n: [list(r.least), list(r.typical), list(r.most)] for n, r in profile.inputs.items()}
                for profile in profiles
            ],
            capabilities=list(plan.capabilities) if plan.flavor == "tensorrt-rtx" else [],
            workspace_bytes=sizes.workspace_bytes,
            timing_cache=str(options.timing_cache) if options.timing_cache else "",
            inspect=plan.flavor == "tensorrt",
        )
        key = self._key(lowered, job, plugin)
        built = self.finished.take(plan_name, key, self.folder)
        if built is None:
            soname = soname_folder(self.library, self.work / "soname")
            built = build_plan(self.library, job, soname, self.progress)
            self.finished.keep(plan_name, key, self.folder, built)
        else:
            with self.progress.stage(f"take {plan_name} from an earlier build"):
                pass
        self.listings[plan_name] = _listing(built, profiles)
        return PlanInfo(
            lowered.inputs, lowered.outputs, profiles, key, built.seconds, built.peak_bytes, lowered.in_place
        )

    def _key(self, lowered: Lowered, job: Job, plugin: PluginChoice | None) -> str:
        """Hash all that a plan depends on. Weights by the hashes of the bundle's manifest, and the head by how it is cut."""
        plan = self.plan
        settings = dataclasses.asdict(job) | {"onnx": "", "plan": "", "plugin": "", "timing_cache": ""}
        device = (plan.device.name, plan.device.capability) if plan.device and plan.flavor == "tensorrt" else ()
        weights = plan.manifest.files[lowered.path.name + names.WEIGHTS_SUFFIX].sha256
        facts = [
            *(plan.flavor, self.library.version_text, platform_name(), device, settings, weights),
            plugin.info.sha256 if plugin else "",
            sorted(lowered.rewritten.items()),
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(lowered.path.read_bytes())
        return digest.hexdigest()

    def _place_plugin(self) -> PluginInfo:
        if self.plugin is None:
            return NO_PLUGIN
        if self.plan.options.embed_plugin:
            return dataclasses.replace(self.plugin.info, embedded=True)
        shutil.copyfile(self.plugin.path, self.folder / names.PLUGIN_LIBRARY)
        return dataclasses.replace(self.plugin.info, file=names.PLUGIN_LIBRARY)

    def _manifest(
        self, plans: dict[str, PlanInfo], plugin: PluginInfo, embedding: Any, seconds: float
    ) -> EngineManifest:
        plan, bundle = self.plan, self.plan.manifest
        limits = plan.sizes.profiles
        files = {path.name: file_info(path) for path in sorted(self.folder.iterdir()) if path.is_file()}
        return EngineManifest(
            model=bundle.model,
            flavor=plan.flavor,
            tensorrt_version=self.library.version_text,
            compute_capabilities=plan.capabilities,
            platform=platform_name(),
            target=plan.target.name,
            dtype=bundle.dtype,
            precision=_precision(plan),
            bundle=plan.bundle.resolve().name,
            bundle_sha256=bundle.model_sha256,
            source=bundle.source,
            source_sha256=bundle.source_sha256,
            logits=bundle.logits,
            limits=Limits(limits.max_batch, limits.prefill_tokens[2], plan.sizes.max_tokens, limits.max_tiles),
            plans=plans,
            plugin=plugin,
            embedding=embedding,
            memory=plan.estimate.memory,
            options=_options_as_text(plan),
            build_seconds=round(seconds, 2),
            tools={"mmm-export": mmm_export.__version__, plan.flavor: self.library.version_text, **_tool_versions()},
            files=files,
            findings=plan.findings,
        )


def _listing(built: Built, profiles: tuple[ProfileInfo, ...]) -> dict[str, Any]:
    """Layers of one plan by the names of its profiles; a later listing of a profile replaces an earlier one."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for form, text in built.listings:
        rows.update(layers_by_profile(form, text))
    forms = sorted({listing_form(form, text) for form, text in built.listings}) or ["none"]
    named = {profiles[i].name if i < len(profiles) else str(i): layers for i, layers in sorted(rows.items())}
    return {"form": ", ".join(forms), "profiles": named}


def _precision(plan: EnginePlan) -> dict[str, str]:
    dtype = plan.manifest.dtype
    parts: dict[str, str] = {"decoder": dtype, "vision": dtype, "embedding": dtype, "logits": "fp32"}
    if plan.manifest.model.mamba_layers:
        parts |= {"ssm_state": "fp32", "conv_state": dtype}
    if plan.manifest.model.attention_layers:
        parts["kv_cache"] = dtype
    return parts


def _options_as_text(plan: EnginePlan) -> dict[str, str]:
    options = plan.options
    alloc = plan.sizes.max_alloc_bytes
    return {
        "prefill_tokens": ",".join(map(str, options.profiles.prefill_tokens)),
        "max_batch": str(options.profiles.max_batch),
        "max_tiles": str(options.profiles.max_tiles),
        "workspace_mib": str(options.workspace_mib),
        "max_alloc_mib": str(alloc >> 20) if alloc < 1 << 60 else "none",
        "embed_plugin": "yes" if options.embed_plugin else "no",
        "opset": str(plan.operators.opset),
    }


def _tool_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("onnx-ir", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _scratch_bytes(plan: EnginePlan, output: Path) -> int:
    """Disk that the lowered graphs take beside the engine: the cut LM head, and all weights where they cannot be linked."""
    spec = plan.manifest.model
    head = math.prod((spec.hidden_size, spec.vocab_size + 64, 4 if plan.manifest.dtype == "fp32" else 2))
    place = next(folder for folder in output.absolute().parents if folder.exists())
    same = place.stat().st_dev == plan.bundle.stat().st_dev
    return head + (0 if same else plan.estimate.memory.weights_bytes)
