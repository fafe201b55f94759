"""What the installed ONNX Runtime is believed to run is what it runs."""

import onnx
import onnxruntime
import pytest

from mmm_export.errors import BundleError
from mmm_export.onnxruntime_support import has_linear_attention, version_tuple
from mmm_export.runtime import Session

LINEAR_ATTENTION = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
one_node (float[B,T,16] q, float[B,T,16] k, float[B,T,16] v, float[B,1,16,16] past, float[B,T,1] decay)
      => (float[B,T,16] y, float[B,1,16,16] state) {
   y, state = com.microsoft.LinearAttention <q_num_heads = 1, kv_num_heads = 1, update_rule = "gated", scale = 1.0>
      (q, k, v, past, decay)
}"""


def test_the_version_that_is_said_to_have_linear_attention_has_it():
    content = onnx.parser.parse_model(LINEAR_ATTENTION).SerializeToString()
    try:
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception:
        assert not has_linear_attention()
    else:
        assert has_linear_attention()


@pytest.mark.parametrize(
    ("text", "numbers"), [("1.26.0", (1, 26, 0)), ("1.26.0rc1", (1, 26, 0)), ("1.9", (1, 9)), ("dev", ())]
)
def test_versions_compare_by_number(text, numbers):
    assert version_tuple(text) == numbers


def test_an_onnxruntime_that_is_too_old_for_the_body_says_which_one_to_export(
    make_checkpoint, make_bundle, monkeypatch
):
    folder = make_bundle(make_checkpoint("linear"), body="linear-attention")
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(BundleError, match="newer ONNX Runtime") as caught:
        Session.open(folder)
    assert "--body standard" in str(caught.value.hint)
