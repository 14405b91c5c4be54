"""The model as a function: right numbers, the same bits in any company, and no silent fallback."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.choices import Device
from pipeline.errors import DeviceFault, ModelError, RuijiError, RunFailed, UsageError
from pipeline.model import load_model
from tests.conftest import ROOT
from tests.cuda.onnxruntime import pretend
from tests.cuda.pretended import H200, V100, PretendedCuda
from tests.factories import tiny_model
from tests.odd_models import odd_model
from workers import devices
from workers.decode.images import load_pixels
from workers.encoder import BoundSession, Encoder
from workers.graph import PIXELS_INPUT, taking_pixels

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)


def weights(path: Path) -> np.ndarray:
    return numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def test_features_are_what_the_graph_computes(model_path: Path) -> None:
    features = Encoder(load_model(model_path), Device.cpu).encode(PIXELS)
    assert features.dtype == np.float32
    assert np.allclose(features, (PIXELS.reshape(11, -1) / 255) @ weights(model_path), atol=1e-4)


def test_channels_first_and_normalised_input_too(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx", layout="NCHW")
    path.with_suffix(".toml").write_text('[input]\nlayout = "NCHW"\nmean = [0.1, 0.2, 0.3]\nstd = [0.5, 0.6, 0.7]\n')
    values = ((PIXELS / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]).transpose(0, 3, 1, 2)
    assert np.allclose(
        Encoder(load_model(path), Device.cpu).encode(PIXELS), values.reshape(11, -1) @ weights(path), atol=1e-4
    )


@pytest.mark.parametrize("batch_images", [1, 3, 8, 64])
def test_company_does_not_change_a_bit(model_path: Path, batch_images: int) -> None:
    model = load_model(model_path)
    alone = np.concatenate([Encoder(model, Device.cpu).encode(PIXELS[i : i + 1]) for i in range(11)])
    assert (Encoder(model, Device.cpu, batch_images=batch_images).encode(PIXELS) == alone).all()


def test_a_graph_with_a_fixed_batch_is_padded(tmp_path: Path, model_path: Path) -> None:
    fixed = Encoder(load_model(tiny_model(tmp_path / "fixed.onnx", batch=4)), Device.cpu)
    assert fixed.batch_images == 4
    assert np.allclose(fixed.encode(PIXELS), Encoder(load_model(model_path), Device.cpu).encode(PIXELS), atol=1e-5)


def test_a_fixed_batch_whose_pictures_depend_on_each_other_is_refused(tmp_path: Path) -> None:
    model = load_model(odd_model(tmp_path / "m.onnx", "dynamic", batch=4))
    encoder, dark = Encoder(model, Device.cpu), PIXELS[:4] // 8
    in_company = encoder.encode(np.concatenate([dark[:1], PIXELS[:3]]))
    assert not np.allclose(encoder.encode(dark)[0], in_company[0], rtol=0.01), "so it is"
    with pytest.raises(ModelError, match=r"another feature .* \(by \d\.\d\d% .*\), .*; export it with an open batch"):
        encoder.prove()
    # One image at a time has no company.
    Encoder(load_model(odd_model(tmp_path / "open.onnx", "dynamic")), Device.cpu).prove()
    Encoder(load_model(tiny_model(tmp_path / "fixed.onnx", batch=4)), Device.cpu).prove()


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_a_build_without_cuda_is_refused_and_auto_takes_the_cpu_without_a_word(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match="built without CUDA"):
        Encoder(load_model(model_path), Device.cuda)
    assert Encoder(load_model(model_path), Device.auto).device == "cpu"
    assert caplog.records == []


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    """A GPU that this process sees."""
    cuda = PretendedCuda(tmp_path / "cuda", ROOT)
    cuda.have(H200)
    monkeypatch.setenv("PRETENDED_CUDA", str(cuda.folder))
    monkeypatch.setattr(devices, "_LIBRARY", str(cuda.library))
    for name in ("InferenceSession", "get_available_providers", "preload_dlls"):
        monkeypatch.setattr(onnxruntime, name, getattr(onnxruntime, name))
    value = onnxruntime.OrtValue
    monkeypatch.setattr(value, "ortvalue_from_numpy", staticmethod(value.ortvalue_from_numpy))
    pretend(onnxruntime)
    return cuda


def test_a_gpu_runs_batches_of_one_size(cuda: PretendedCuda, model_path: Path) -> None:
    model = load_model(model_path)
    encoder = Encoder(model, Device.auto, batch_images=4)
    assert (encoder.device, encoder.run_images) == ("cuda", 4)
    assert np.allclose(encoder.encode(PIXELS), Encoder(model, Device.cpu).encode(PIXELS), atol=1e-5)
    # Scripts give the plain word.
    assert Encoder(model, "cpu").device == "cpu"


def test_a_gpu_does_not_take_a_model_whose_pictures_depend_on_each_other(
    cuda: PretendedCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(odd_model(tmp_path / "m.onnx", "dynamic"))
    with pytest.raises(UsageError, match=r"another feature .* take --device cpu"):
        Encoder(model, Device.cuda)
    encoder = Encoder(model, Device.auto)
    assert encoder.device == "cpu" and encoder.run_images == 1
    assert re.search("another feature .* the CPU runs the model", caplog.text)


def test_a_process_sleeps_while_it_waits_for_its_gpu(cuda: PretendedCuda, model_path: Path) -> None:
    Encoder(load_model(model_path), Device.cuda)
    # 4 is the flag for that; on a context that is in use it might come too late.
    assert cuda.calls() == ["flags 0 4", "session"]


BUSY_DEVICE = "CUDA failure 46: CUDA-capable device(s) is/are busy or unavailable ; GPU=0 ; expr=cudaSetDevice(0)"
NO_KERNEL = "CUDA failure 209: no kernel image is available for execution on the device ; GPU=0"


def long_words(error: str, kind: str = "cudaError", where: str = "Exception during initialization: ") -> str:
    """An error of CUDA as ONNX Runtime throws it: behind the signature of what called, and before place and source."""
    call = (
        "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:123 std::conditional_t<THRW, void, "
        "onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const char*, SUCCTYPE, const char*, "
        f"const char*, int) [with ERRTYPE = {kind}; bool THRW = true; SUCCTYPE = {kind}; "
        "std::conditional_t<THRW, void, onnxruntime::common::Status> = void] "
    )
    place = "GPU=0 ; hostname=gpu-node-17.rack-4.example ; file=/onnxruntime_src/onnxruntime/core/providers/cuda"
    return (
        f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {where}{call}{error} ; {place}/x.cc ; line=168 ; expr=f(&x, y); "
    )


ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
    "Name:'/vision_model/embeddings/patch_embedding/Conv' Status Message: /onnxruntime_src/onnxruntime/core/framework/"
    "bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*, bool, "
    "onnxruntime::WaitNotificationFn) Available memory of 16777216 is smaller than requested bytes of 154140672"
)


@pytest.mark.parametrize(
    ("where", "words", "kind", "told"),
    [
        ("create", BUSY_DEVICE, DeviceFault, "busy or unavailable"),
        ("run", "CUDNN_FE failure 11: CUDNN_BACKEND_API_FAILED ; GPU=0", DeviceFault, "CUDNN_BACKEND_API_FAILED"),
        ("run", "CUDA error cudaErrorIllegalAddress:an illegal memory access was encountered", DeviceFault, "illegal"),
        ("run", NO_KERNEL, UsageError, "this GPU cannot run the model: CUDA failure 209"),
        (
            "create",
            long_words("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", "cublasStatus_t"),
            DeviceFault,
            "failure 3",
        ),
        ("create", long_words("CUDA failure 2: out of memory"), DeviceFault, "… .*CUDA failure 2: out of memory"),
        ("run", long_words("CUDA failure 719: unspecified launch failure", where=""), DeviceFault, "failure 719"),
        ("run", long_words(NO_KERNEL), UsageError, "this GPU cannot run the model: … .*no kernel image"),
        ("run", ARENA, DeviceFault, "Available memory of 16777216 is smaller than requested bytes of 154140672"),
        ("run", "an error that nobody knows", UsageError, "this GPU cannot run the model: .*nobody knows"),
        ("create", "an error that nobody knows", UsageError, "this GPU cannot run the model: .*nobody knows"),
        ("absent", "yes", UsageError, "cannot load its CUDA provider: .*libonnxruntime_providers_cuda.so"),
    ],
)
def test_a_gpu_that_fails_is_told_in_its_own_words_and_auto_goes_on_on_the_cpu(
    cuda: PretendedCuda,
    model_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    where: str,
    words: str,
    kind: type[Exception],
    told: str,
) -> None:
    cuda.fail(where, words)
    model = load_model(model_path)
    with pytest.raises(RuijiError, match=told) as caught:
        Encoder(model, Device.cuda)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    encoder = Encoder(model, Device.auto)
    assert encoder.device == "cpu" and encoder.run_images == 1
    (record,) = caplog.records
    assert re.search(told, record.getMessage()) and record.getMessage().endswith("the CPU runs the model")
    assert (encoder.encode(PIXELS) == Encoder(model, Device.cpu).encode(PIXELS)).all()
    assert capfd.readouterr().out == ""


def test_a_driver_that_does_not_serve_is_told_too(cuda: PretendedCuda, model_path: Path) -> None:
    cuda.have(V100)
    with pytest.raises(UsageError, match=r"Tesla V100 .*7\.0"):
        Encoder(load_model(model_path), Device.cuda)
    assert Encoder(load_model(model_path), Device.auto).device == "cpu"


def test_a_gpu_that_ran_the_model_and_does_not_any_more_is_at_fault_not_the_model(
    cuda: PretendedCuda, model_path: Path
) -> None:
    # It has run the model when it was loaded.
    encoder = Encoder(load_model(model_path), Device.cuda)
    encoder.prove()
    cuda.fail("run", "words that nobody knows")
    with pytest.raises(RunFailed):
        encoder.encode(PIXELS)
    with pytest.raises(DeviceFault, match=r"runs the model no longer: .* words that nobody knows"):
        encoder.prove()


def test_a_graph_that_the_runtime_refuses_is_a_model_error(tmp_path: Path) -> None:
    graph = onnx.load(tiny_model(tmp_path / "m.onnx"))
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="refuses the model"):
        Encoder(load_model(tmp_path / "m.onnx"), Device.cpu)


@pytest.fixture
def real_gpu() -> None:
    """A test that needs a GPU is skipped with the reason why there is none."""
    found = devices.look()
    if not found.usable:
        pytest.skip(f"no GPU: {found.problem}")


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(model_path: Path, real_gpu: None) -> None:
    model = load_model(model_path)
    cuda, cpu = Encoder(model, Device.cuda).encode(PIXELS), Encoder(model, Device.cpu).encode(PIXELS)
    assert cosines(cuda, cpu).min() >= 0.9999


#: Models and the golden features that they have to give.
GOLDEN = [
    ("mobilenet_v3_large_100_224_feature_vector", "mobilenet_v3_large"),
    ("mobilenet_v2_100_224_feature_vector", "mobilenet_v2"),
]


@pytest.mark.parametrize(("name", "golden"), GOLDEN)
def test_golden_features_come_out(shared_data: Path, name: str, golden: str) -> None:
    encoder, pixels, expected = golden_photos(shared_data, name, golden, step=25, device=Device.cpu)
    for photo, feature in zip(pixels, expected, strict=True):
        assert np.abs(encoder.encode(photo[np.newaxis])[0] - feature).max() <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "golden"), GOLDEN)
def test_golden_features_come_out_on_cuda(shared_data: Path, real_gpu: None, name: str, golden: str) -> None:
    """In full precision: where ONNX Runtime took TensorFloat-32 against its order, this is where it shows."""
    encoder, pixels, expected = golden_photos(shared_data, name, golden, step=1, device=Device.cuda)
    assert cosines(encoder.encode(pixels), expected).min() >= 0.9999


def golden_photos(
    shared_data: Path, name: str, golden: str, step: int, device: Device
) -> tuple[Encoder, np.ndarray, np.ndarray]:
    """An encoder, pixels of every so many of the 250 golden photos, and their golden features."""
    model = load_model(shared_data / "models" / f"{name}.onnx")
    ids = np.load(shared_data / "golden" / f"{golden}.object_ids.npy", allow_pickle=False)[::step]
    expected = np.load(shared_data / "golden" / f"{golden}.features.npy", allow_pickle=False)[::step]
    paths = {line.rpartition("/")[2]: line for line in (shared_data / "photos" / "objects.txt").read_text().split()}
    pixels = np.stack([load_pixels(shared_data / "photos" / paths[id_], model.spec, 10**8) for id_ in ids])
    return Encoder(model, device), pixels, expected


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_scaling_in_the_graph_gives_the_same_bits_as_scaling_before_it(tmp_path: Path, layout: str) -> None:
    path = tiny_model(tmp_path / "m.onnx", layout=layout)
    scaling = "mean = [0.1, 0.2, 0.3]\nstd = [0.5, 0.6, 0.7]\n"
    path.with_suffix(".toml").write_text(f'[input]\nlayout = "{layout}"\n{scaling}')
    model = load_model(path)
    source = taking_pixels(model, always=True)
    assert source is not None
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (scaled,) = session.run(None, {PIXELS_INPUT: PIXELS[:1]})
    assert (scaled == Encoder(model, Device.cpu).encode(PIXELS[:1])).all()


def leading_model(
    path: Path,
    steps: list[tuple[str, object, bool]],
    perm: list[int],
    *,
    used_twice: bool = False,
    constant_nodes: bool = False,
) -> Path:
    """A model that scales its pixels and transposes them, before all are multiplied with a fixed random matrix."""
    nodes, constants, name = [], [], "inputs:0"
    for number, (operator, constant, first) in enumerate(steps):
        tensor = numpy_helper.from_array(np.asarray(constant, np.float32), f"c{number}")
        if constant_nodes:
            nodes.append(helper.make_node("Constant", [], [f"c{number}"], value=tensor))
        else:
            constants.append(tensor)
        inputs = [f"c{number}", name] if first else [name, f"c{number}"]
        name = f"x{number}"
        nodes.append(helper.make_node(operator, inputs, [name]))
    nodes.append(helper.make_node("Transpose", [name], ["planes"], perm=perm))
    nodes.append(helper.make_node("Flatten", ["planes"], ["flat"], axis=1))
    nodes.append(helper.make_node("MatMul", ["flat", "weights"], ["feature_vector"]))
    if used_twice:
        nodes.append(helper.make_node("Neg", ["x0"], ["another"]))
    weights = np.random.default_rng(3).normal(size=(192, 12)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "leading",
        [helper.make_tensor_value_info("inputs:0", TensorProto.FLOAT, ["n", 8, 8, 3])],
        [helper.make_tensor_value_info("feature_vector", TensorProto.FLOAT, ["n", 12])],
        [*constants, numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


CHANNELS = [0.4, 0.5, 0.6]
TO_PLANES = [0, 3, 1, 2]


@pytest.mark.parametrize(
    "steps",
    [
        [("Sub", CHANNELS, False), ("Div", [0.2, 0.3, 0.7], False)],
        [("Mul", 2.0, False), ("Add", [[[[-1.0, -2.0, -3.0]]]], True)],
        [("Sub", CHANNELS, True), ("Div", [1.5], True)],
    ],
)
@pytest.mark.parametrize("constant_nodes", [False, True])
def test_scaling_is_done_on_planes_with_the_same_bits(tmp_path: Path, steps: Any, constant_nodes: bool) -> None:
    model = load_model(leading_model(tmp_path / "m.onnx", steps, TO_PLANES, constant_nodes=constant_nodes))
    source = taking_pixels(model, always=False)
    assert source is not None
    kinds = [node.op_type for node in onnx.load_from_string(source).graph.node if node.op_type != "Constant"]
    assert kinds[:5] == ["Transpose", "Cast", "Div", steps[0][0], steps[1][0]] and kinds[5:] == ["Flatten", "MatMul"]
    assert (Encoder(model, Device.cpu).encode(PIXELS) == Encoder(model, Device.cpu, many=False).encode(PIXELS)).all()


@pytest.mark.parametrize(
    ("steps", "perm", "used_twice"),
    [
        ([("Sub", CHANNELS, False)], [0, 3, 2, 1], False),
        ([("Sub", CHANNELS, False)], TO_PLANES, True),
        ([("Sub", np.ones((8, 3)), False)], TO_PLANES, False),
        ([("Sub", np.ones((8, 1, 1)), False)], TO_PLANES, False),
        ([("Pow", CHANNELS, False)], TO_PLANES, False),
        ([], TO_PLANES, False),
    ],
    ids=["another order", "used twice", "by column", "by row", "no arithmetic", "no scaling"],
)
def test_a_graph_that_begins_otherwise_is_taken_as_it_is(
    tmp_path: Path, steps: Any, perm: list[int], used_twice: bool
) -> None:
    model = load_model(leading_model(tmp_path / "m.onnx", steps, perm, used_twice=used_twice))
    assert taking_pixels(model, always=False) is None
    source = taking_pixels(model, always=True)
    assert source is not None
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (features,) = session.run(["feature_vector"], {PIXELS_INPUT: PIXELS[:1]})
    assert (features == Encoder(model, Device.cpu).encode(PIXELS[:1])).all()


@pytest.mark.parametrize("name", ["mobilenet_v3_large_100_224_RANDOM_WEIGHTS", "mobilenet_v2_100_224_feature_vector"])
def test_the_quicker_graph_of_a_real_model_gives_the_same_bits(shared_data: Path, name: str) -> None:
    model = load_model(shared_data / "models" / f"{name}.onnx")
    assert taking_pixels(model, always=False) is not None
    pixels = np.random.default_rng(5).integers(0, 256, size=(2, 224, 224, 3), dtype=np.uint8)
    assert (Encoder(model, Device.cpu).encode(pixels) == Encoder(model, Device.cpu, many=False).encode(pixels)).all()


@pytest.mark.parametrize("scaled", [True, False])
def test_a_bound_session_computes_each_batch_anew(model_path: Path, scaled: bool) -> None:
    model = load_model(model_path)
    source = taking_pixels(model, always=True) if scaled else str(model_path)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    bound = BoundSession(session, model, 4, "cpu")
    expected = Encoder(model, Device.cpu).encode(PIXELS)
    for start in (0, 4, 7):
        assert np.allclose(bound.run(PIXELS[start : start + 4]), expected[start : start + 4], atol=1e-5)


def test_weights_outside_the_file_are_not_copied_into_it(tmp_path: Path) -> None:
    whole = onnx.load(tiny_model(tmp_path / "m.onnx"))
    onnx.save(whole, tmp_path / "split.onnx", save_as_external_data=True, size_threshold=0)
    assert taking_pixels(load_model(tmp_path / "split.onnx"), always=True) is None


def test_a_limit_of_the_arena_is_named_where_the_memory_does_not_suffice(cuda: PretendedCuda, model_path: Path) -> None:
    cuda.fail("run", ARENA)
    with pytest.raises(DeviceFault, match=r"its arena may take 16 MB here \(RUIJI_GPU_MEMORY_MB\)"):
        Encoder(load_model(model_path), Device.cuda, gpu_memory_mb=16)
