"""Drives a bundle with nothing but ONNX Runtime and its manifest.json: the contract as a stranger would read it."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime

TYPES = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


class PlainBundle:
    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        with environment(self.manifest["environment"]):
            self.graphs = {name: session(self.folder / name) for name in self.manifest["graphs"]}
        self.hidden = self.manifest["model"]["hidden_size"]

    def types(self, graph):
        return {i["name"]: TYPES[i["dtype"]] for i in self.manifest["graphs"][graph]["inputs"]}

    def embed(self, ids, pixels=None):
        """ids (B, T), pixels (tiles, 3, S, S) -> (B, T, hidden)."""
        features = np.zeros((0, self.hidden), self.types("embedding.onnx")["image_features"])
        if pixels is not None:
            (features,) = self.graphs["vision.onnx"].run(None, {"pixel_values": pixels})
        feeds = {"input_ids": np.asarray(ids, np.int64), "image_features": features}
        return self.graphs["embedding.onnx"].run(None, feeds)[0]

    def states(self, batch):
        rows = self.manifest["graphs"]["decoder.onnx"]["inputs"]
        past = [r for r in rows if r["name"].startswith("past.")]
        return {r["name"]: np.zeros([batch, *r["shape"][1:]], TYPES[r["dtype"]]) for r in past}

    def decode(self, embeds, lengths, states, past_lengths=None):
        """Returns logits and the states of the next call."""
        feeds = {"inputs_embeds": embeds, "lengths": np.asarray(lengths, np.int32), **states}
        if "past_lengths" in self.types("decoder.onnx"):
            past = np.zeros(len(embeds)) if past_lengths is None else past_lengths
            feeds["past_lengths"] = np.asarray(past, np.int32)
        graph = self.graphs["decoder.onnx"]
        outputs = dict(zip([o.name for o in graph.get_outputs()], graph.run(None, feeds), strict=True))
        return outputs["logits"], {name: outputs[name.replace("past", "present", 1)] for name in states}


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def environment(variables):
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
