"""The export for people without a model, on small torch modules in place of timm's."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.model import load_model

pytest.importorskip("torch", reason="the export is made with torch, which is not installed")
pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript, which is not installed")

import torch

from examples import export_mobilenet, onnx_export

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 16


def small_module(length: int = 12) -> torch.nn.Module:
    """float32[n, 3, h, w] to float32[n, length], with the kinds of layers that a MobileNetV3 has."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.Hardswish(),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
        torch.nn.Hardsigmoid(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Conv2d(8, length, 1),
        torch.nn.Flatten(),
    )
    norm = module[1]
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert norm.running_mean is not None
    norm.running_mean.normal_()
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small module in the article's contract."""
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    assert export_mobilenet.export(small_module(), path, MEAN, STD, SIZE) <= 1e-4
    return path


def images(count: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """float32[count, SIZE, SIZE, 3] in [0, 1)."""
    return np.random.default_rng(7).random((count, SIZE, SIZE, 3), dtype=np.float32)


def test_normalisation_is_folded(exported: Path) -> None:
    import onnxruntime as ort

    batch = images(5)
    session = ort.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    (found,) = session.run(["feature_vector"], {"inputs:0": batch})
    # By hand, in float64 and outside the graph.
    normal = ((batch.astype(np.float64) - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        expected = small_module().eval()(torch.from_numpy(np.ascontiguousarray(normal))).numpy()
    assert np.abs(found - expected).max() < 1e-5


def test_file_is_in_the_default_contract(exported: Path) -> None:
    model = load_model(exported)
    spec = model.spec
    assert (spec.input_name, spec.output_name) == ("inputs:0", "feature_vector")
    assert (spec.layout, spec.color, spec.height, spec.width, spec.length) == ("NHWC", "RGB", SIZE, SIZE, 12)
    assert (spec.divisor, spec.mean, spec.std) == (255, (0, 0, 0), (1, 1, 1))
    assert model.batch is None


def test_export_is_one_file_with_nothing_of_this_machine(exported: Path) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["small.onnx"]
    assert b".py" not in exported.read_bytes()


def test_the_same_module_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    export_mobilenet.export(small_module(), tmp_path / "again.onnx", MEAN, STD, SIZE)
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def tamper(path: Path, value: float) -> None:
    """Change the largest weight of a graph by a little, or to NaN."""
    model = onnx.load(path)
    weights = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
    tensor = max(weights, key=lambda w: int(np.prod(w.dims)))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(value), tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_a_tampered_graph_is_refused(exported: Path, tmp_path: Path, value: float) -> None:
    path = tmp_path / "tampered.onnx"
    path.write_bytes(exported.read_bytes())
    whole = export_mobilenet.Normalised(small_module(), MEAN, STD)
    batches = [torch.from_numpy(images(3))]
    assert onnx_export.check_export(whole, path, batches) <= 1e-4
    tamper(path, value)
    with pytest.raises(onnx_export.ExportError, match="differs from torch"):
        onnx_export.check_export(whole, path, batches)


def test_a_graph_of_another_shape_is_refused(exported: Path) -> None:
    whole = export_mobilenet.Normalised(small_module(length=13), MEAN, STD)
    with pytest.raises(onnx_export.ExportError, match=r"\[3, 12\]"):
        onnx_export.check_export(whole, exported, [torch.from_numpy(images(3))])


def pretend_timm(monkeypatch: pytest.MonkeyPatch, length: int = export_mobilenet.FEATURE_LENGTH) -> None:
    """A stand-in with the two functions of timm that are called."""

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> torch.nn.Module:
        assert (name, pretrained, num_classes) == ("mobilenetv3_large_100", True, 0)
        return small_module(length)

    config = {"mean": MEAN, "std": STD, "input_size": (3, 224, 224)}
    timm = ModuleType("timm")
    timm.create_model = create_model  # type: ignore[attr-defined]
    timm.data = SimpleNamespace(resolve_model_data_config=lambda module: config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)


def test_command_line_with_a_stand_in_for_timm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_timm(monkeypatch)
    out = tmp_path / "model.onnx"
    export_mobilenet.main([str(out)])
    assert "d = 1280" in capsys.readouterr().out
    spec = load_model(out).spec
    assert (spec.height, spec.width, spec.length) == (224, 224, 1280)


def test_command_line_exits_1_and_writes_nothing_when_the_check_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_timm(monkeypatch)

    def export_badly(module: torch.nn.Module, example: torch.Tensor, path: Path, **names: str) -> None:
        onnx_export.export_onnx(module, example, path, **names)
        tamper(path, 0.01)

    monkeypatch.setattr(export_mobilenet, "export_onnx", export_badly)
    with pytest.raises(SystemExit) as raised:
        export_mobilenet.main([str(tmp_path / "model.onnx")])
    assert raised.value.code == 1
    assert "differs from torch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_line_refuses_another_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_timm(monkeypatch, length=960)
    with pytest.raises(SystemExit) as raised:
        export_mobilenet.main([str(tmp_path / "model.onnx")])
    assert raised.value.code == 1
    assert "960 values an image, expected 1280" in capsys.readouterr().err


def test_command_line_says_that_timm_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit) as raised:
        export_mobilenet.main([str(tmp_path / "model.onnx")])
    assert raised.value.code == 1
    assert "pip install timm" in capsys.readouterr().err
