"""`ruiji model add hf:ORG/REPO`, with the library huggingface_hub and a hub on loopback."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pipeline.model import load_model
from tests.factories import Ruiji, only_line
from tests.models.hub import COMMIT, Hub
from tests.workers.test_model_library import CLIP, exported, source_of
from workers.models.library import add_model

pytest.importorskip("huggingface_hub", reason="downloads need huggingface_hub, which is not installed")

Add = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A repository with a graph of 40 kB, and weights of torch that run a command when they are unpickled."""
    folder = source_of(tmp_path / "theirs")
    graph = onnx.load(folder / "model.onnx")
    graph.graph.initializer.append(numpy_helper.from_array(np.arange(10_000, dtype=np.float32), "long"))
    graph.graph.node.append(helper.make_node("ReduceSum", ["long"], ["unused"], keepdims=0))
    onnx.save(graph, folder / "model.onnx")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s/unpickled'\ntR." % str(tmp_path).encode())
    (folder / "modeling_theirs.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    return folder


@pytest.fixture
def add(ruiji: Ruiji, tmp_path: Path) -> Add:
    """The command, with a hub."""

    def call(hub: Hub, *arguments: str, code: int = 0) -> "CompletedProcess[str]":
        with hub.serving() as environment:
            ruiji.environment = {
                **environment,
                "RUIJI_MODELS": str(tmp_path / "models"),
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_OFFLINE": "",
            }
            return ruiji("model", "add", *arguments, code=code)

    return call


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "models").glob("*"))


def test_a_repository_is_added_as_its_folder_is(theirs: Path, add: Add, tmp_path: Path) -> None:
    hub = Hub.of_folder(theirs)
    done = add(hub, "hf:org/model@main")
    assert "added model, licence: apache-2.0" in done.stderr
    facts = json.loads((tmp_path / "models" / "model" / "source.json").read_text())
    assert (facts["source"], facts["graph"], facts["revision"]) == ("hf:org/model@main", "model.onnx", COMMIT)
    folder = add_model(theirs, tmp_path / "others", "model")
    downloaded = load_model(tmp_path / "models" / "model" / "model.onnx")
    assert downloaded.fingerprint == load_model(folder.path).fingerprint
    assert left(tmp_path) == ["model"], "downloads are gone"
    asked = {path.rpartition("/")[2] for _, path, _ in hub.asked}
    assert not asked & {"pytorch_model.bin", "modeling_theirs.py"}, "nothing that could be executed is asked for"
    assert not (tmp_path / "unpickled").exists() and not (tmp_path / "executed").exists()


def test_a_check_asks_for_the_networks_own_weights(theirs: Path, add: Add, tmp_path: Path) -> None:
    (theirs / "model.safetensors").write_bytes(b"x" * 2000)
    (theirs / "deep").mkdir()
    (theirs / "deep" / "other.safetensors").write_bytes(b"x")
    hub = Hub.of_folder(theirs)
    add(hub, "hf:org/model")
    assert hub.downloaded("model.safetensors") == 0
    add(hub, "hf:org/model", "--check", "--name", "other", code=None)
    assert hub.downloaded("model.safetensors") == 1 and hub.downloaded("other.safetensors") == 0


def test_a_download_that_is_cut_off_goes_on_where_it_was(theirs: Path, add: Add, tmp_path: Path) -> None:
    # The library takes 10 MB at a time, and keeps what is whole of that.
    large, piece = theirs / "model.onnx", 10 << 20
    graph = onnx.load(large)
    graph.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.ones(6 << 20, np.float32), "long"))
    onnx.save(graph, large)
    hub = Hub.of_folder(theirs, cuts={"model.onnx": 2})
    add(hub, "hf:org/model")
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith("model.onnx")]
    assert ranges == [None, f"bytes={piece}-", f"bytes={piece}-"]
    assert (tmp_path / "models" / "model" / "model.onnx").read_bytes() == hub.files["model.onnx"]


def test_a_command_that_failed_does_not_download_all_again(
    theirs: Path, add: Add, ruiji: Ruiji, tmp_path: Path
) -> None:
    exported(theirs, ("one", "other"))
    graph = onnx.load(theirs / "model.onnx")
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros(1 << 18, np.float32), "long"))
    onnx.save(graph, theirs / "model.onnx")
    hub = Hub.of_folder(theirs)
    refused = only_line(add(hub, "hf:org/model", code=2).stderr)
    kept = tmp_path / "models" / f".download-org--model-{COMMIT}"
    assert "several outputs (one, other)" in refused and f"for another try: 1 MB in {kept}; delete it" in refused
    assert f"{kept}: 1 MB of a command that failed" in ruiji("model", "list").stderr
    (kept.parent / f".download-org--model-{40 * 'a'}").mkdir()
    (kept.parent / f".download-org--model-x-{40 * 'a'}").mkdir()
    add(hub, "hf:org/model", "--output", "one")
    assert hub.downloaded("model.onnx") == 1
    assert left(tmp_path) == [f".download-org--model-x-{40 * 'a'}", "model"], "older commits go too, other models not"


def test_weights_beside_the_graph_are_downloaded_and_nothing_outside(theirs: Path, add: Add, tmp_path: Path) -> None:
    graph = onnx.load(theirs / "model.onnx")
    (theirs / "onnx").mkdir()
    (theirs / "model.onnx").unlink()
    onnx.save(
        graph, theirs / "onnx" / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1000
    )
    add(Hub.of_folder(theirs), "hf:org/model")
    assert (tmp_path / "models" / "model" / "weights.bin").is_file()
    hostile = onnx.load(theirs / "onnx" / "model.onnx", load_external_data=False)
    for tensor in hostile.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../preprocessor_config.json"
    (theirs / "onnx" / "model.onnx").write_bytes(hostile.SerializeToString())
    refused = only_line(add(Hub.of_folder(theirs), "hf:org/model", "--name", "hostile", code=2).stderr)
    assert "not a file beside it" in refused


@pytest.mark.parametrize("name", ["model.onnx", "preprocessor_config.json"])
def test_a_file_that_is_not_what_the_hub_states_is_refused(theirs: Path, add: Add, tmp_path: Path, name: str) -> None:
    hub = Hub.of_folder(theirs, wrong={name})
    assert f"{name} of org/model is not what the hub says" in only_line(add(hub, "hf:org/model", code=2).stderr)
    hub.wrong.clear()
    add(hub, "hf:org/model")
    assert hub.downloaded(name) == 2, "the wrong one is not kept"


@pytest.mark.parametrize(
    "name", ["../evil.onnx", "/etc/evil.onnx", "a/../../evil.json", "a\0b.onnx", "a\\b", "x//y", ""]
)
def test_hostile_names_are_refused_before_anything_is_downloaded(
    theirs: Path, add: Add, tmp_path: Path, name: str
) -> None:
    hub = Hub.of_folder(theirs, listed=[name])
    assert "which no repository can have" in only_line(add(hub, "hf:org/model", code=2).stderr)
    assert not any("resolve" in path for _, path, _ in hub.asked)
    assert left(tmp_path) == []


def test_a_hostile_etag_writes_nothing_elsewhere(theirs: Path, add: Add, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    add(Hub.of_folder(theirs, etags={"model.onnx": "../../../../evil"}), "hf:org/model", code=1)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


def test_which_of_several_graphs_is_not_guessed(theirs: Path, add: Add, tmp_path: Path) -> None:
    hub = Hub.of_folder(theirs)
    hub.files |= {"onnx/model.onnx": hub.files["model.onnx"], "onnx/text_model.onnx": b"x", "textual/model.onnx": b"x"}
    refused = only_line(add(hub, "hf:org/model", code=2).stderr)
    assert "several models (model.onnx, onnx/model.onnx)" in refused
    assert "ruiji model add hf:org/model:model.onnx" in refused
    add(hub, "hf:org/model:onnx/model.onnx")
    assert json.loads((tmp_path / "models" / "model" / "source.json").read_text())["graph"] == "onnx/model.onnx"


def test_what_the_convention_cannot_do_is_refused_before_the_weights_come(theirs: Path, add: Add) -> None:
    (theirs / "preprocessor_config.json").write_text(json.dumps({**CLIP, "do_pad": True}))
    hub = Hub.of_folder(theirs)
    assert "do_pad is True" in only_line(add(hub, "hf:org/model", code=2).stderr)
    assert hub.downloaded("model.onnx") == 0
    assert left(theirs.parent) == [], "nothing is kept of configurations alone"


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ("hf:model", 2, "is not hf:ORG/REPO"),
        ("hf:org/model:none.onnx", 2, "hf:org/model has no file none.onnx"),
        ("hf:org/model@v9", 2, "there is no such revision"),
        ("hf:org/other", 2, "has no hf:org/other for you"),
        ("hf:org/mo--del", 2, "hf:org/mo--del"),
    ],
)
def test_what_is_not_there_is_one_line(theirs: Path, add: Add, given: str, code: int, words: str) -> None:
    assert words in only_line(add(Hub.of_folder(theirs), given, code=code).stderr)


def test_without_a_network_one_line_names_the_way_by_a_folder(ruiji: Ruiji, tmp_path: Path) -> None:
    ruiji.environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "RUIJI_MODELS": str(tmp_path / "models")}
    refused = only_line(ruiji("model", "add", "hf:org/model", code=1).stderr)
    assert "cannot be had from http://127.0.0.1:9" in refused and "ruiji model add FOLDER" in refused
    ruiji.environment["HF_HUB_OFFLINE"] = "1"
    assert "ruiji model add FOLDER" in only_line(ruiji("model", "add", "hf:org/model", code=1).stderr)


def test_what_is_no_hub_is_said(theirs: Path, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub.of_folder(theirs)
    answers: list[Any] = [{}, [], {"siblings": [{}], "id": "x"}, {"id": "x", "sha": "../../x", "siblings": []}]
    for answer in answers:
        monkeypatch.setattr(Hub, "_info", lambda self, answer=answer: answer)
        refused = only_line(add(hub, "hf:org/model", code=None).stderr)
        assert "no Hugging Face hub" in refused or "which is no commit" in refused
