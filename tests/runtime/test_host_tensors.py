"""What of a GPU's step lies on the host: pinned tensors, over a stand-in for the CUDA driver, and rows of the embedding table."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmm_export.runtime import pinned_memory
from mmm_export.runtime.device_values import CPU, CUDA, DeviceTensor
from mmm_export.runtime.pinned_memory import PinnedMemoryError, PinnedTensor, tensor_for_host
from mmm_export.runtime.token_rows import TokenRows


class Driver:
    """Counts what is held; `refused` names a call that answers with an error."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.memory: dict[int, Any] = {}
        self.retained = self.pushed = 0

    def _answer(self, name: str) -> int:
        return 2 if name == self.refused else 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802 - the driver's own names
        return self._answer("cuDeviceGet")

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        self.retained += 1
        return self._answer("cuDevicePrimaryCtxRetain")

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802
        self.retained -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.pushed += 1
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.pushed -= 1
        return 0

    def cuMemHostAlloc(self, address: Any, size: Any, flags: int) -> int:  # noqa: N802
        if answer := self._answer("cuMemHostAlloc"):
            return answer
        memory = ctypes.create_string_buffer(size.value)
        self.memory[ctypes.addressof(memory)] = memory
        address._obj.value = ctypes.addressof(memory)
        return 0

    def cuMemFreeHost(self, address: Any) -> int:  # noqa: N802
        del self.memory[address.value]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(pinned_memory, "_driver", lambda: made)
    yield made
    assert made.pushed == 0
    assert made.retained == 0


def test_what_is_written_at_the_bound_address_is_read_and_a_copy(driver: Driver) -> None:
    tensor = PinnedTensor((2, 1, 3), "float32")
    bound: list[Any] = []

    class Binding:
        def bind_output(self, *place: Any) -> None:
            bound.extend(place)

    tensor.bind_output(Binding(), "logits")
    assert bound[:5] == ["logits", CUDA, 0, 1, [2, 1, 3]]
    np.ctypeslib.as_array((ctypes.c_float * 6).from_address(bound[5]))[:] = range(6)
    read = tensor.read()
    np.testing.assert_array_equal(read, np.arange(6, dtype=np.float32).reshape(2, 1, 3))
    np.ctypeslib.as_array((ctypes.c_float * 6).from_address(bound[5]))[:] = 7
    assert read[1, 0, 2] == 5


def test_closing_frees_the_memory_once(driver: Driver) -> None:
    tensor = PinnedTensor((4,), "float32")
    assert len(driver.memory) == 1
    tensor.close()
    tensor.close()
    assert driver.memory == {}


def test_memory_of_a_dropped_tensor_is_freed(driver: Driver) -> None:
    tensor = PinnedTensor((4,), "float32")
    del tensor
    assert driver.memory == {}


@pytest.mark.parametrize("refused", ["cuDeviceGet", "cuMemHostAlloc"])
def test_a_refusal_leaves_nothing_held(driver: Driver, refused: str) -> None:
    driver.refused = refused
    with pytest.raises(PinnedMemoryError, match="answered 2"):
        PinnedTensor((4,), "float32")
    assert driver.memory == {}


def test_without_a_driver_the_tensor_lies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise PinnedMemoryError("no driver")

    monkeypatch.setattr(pinned_memory, "_driver", refuse)
    monkeypatch.setattr(pinned_memory, "DeviceTensor", lambda shape, dtype, device: (shape, dtype, device))
    assert tensor_for_host((1, 2), CUDA) == ((1, 2), "float32", CUDA)


def test_on_a_cpu_nothing_is_pinned() -> None:
    assert isinstance(tensor_for_host((1, 2), CPU), DeviceTensor)


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    table = np.arange(30, dtype=np.float16).reshape(10, 3)
    (tmp_path / "table").write_bytes(table.tobytes())
    rows = TokenRows.open(tmp_path / "table", 3, np.float16, 10)
    assert rows is not None
    np.testing.assert_array_equal(rows.look_up(np.array([[7], [2]])), table[[[7], [2]]])


@pytest.mark.parametrize(("size", "least"), [(61, 10), (60, 11), (54, 10)])
def test_a_file_that_is_no_table_of_the_vocabulary_is_not_taken(tmp_path: Path, size: int, least: int) -> None:
    (tmp_path / "table").write_bytes(bytes(size))
    assert TokenRows.open(tmp_path / "table", 3, np.float16, least) is None
