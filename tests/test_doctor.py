"""`snapgen doctor` finds what is wrong and says what to do."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from snapgen_core.cli import main
from snapgen_core.commands import doctor
from snapgen_core.errors import UserError
from snapgen_core.paths import data_dir


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A healthy home with small weights."""
    shutil.copytree(data_dir() / "emoji", tmp_path / "data" / "emoji")
    (tmp_path / "data" / "photos").mkdir()
    (tmp_path / "data" / "photos" / "a.webp").touch()
    for model in doctor.MODELS:
        folder = tmp_path / "data" / "checkpoints" / "tiny" / model
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        save_file({"weight": np.zeros(1000, np.float16)}, folder / "model.safetensors")
    monkeypatch.setenv("SNAPGEN_HOME", str(tmp_path))
    return tmp_path


def failures(capfd):
    out, err = capfd.readouterr()
    assert err == ""
    found = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert all("->" in line for line in found), "a failure without a remedy"
    return found


def test_a_healthy_home_passes(home, capfd):
    assert main(["doctor"]) == 0
    assert failures(capfd) == []


@pytest.mark.parametrize("cut", [1, 900, 2050])  # inside the length, the header, the values
def test_truncated_weights_fail(home, capfd, cut):
    path = home / "data" / "checkpoints" / "tiny" / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert main(["doctor"]) == 2
    found = failures(capfd)
    assert len(found) == 1 and "weights base" in found[0] and "make checkpoints" in found[0]


def test_foreign_and_missing_weights_fail(home, capfd):
    root = home / "data" / "checkpoints" / "tiny"
    (root / "detector" / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle, not safetensors")
    (root / "autoencoder" / "config.json").unlink()
    shutil.rmtree(root / "text_l")
    header = json.dumps({"a": {"dtype": "F16", "shape": [10**9], "data_offsets": [0, 2 * 10**9]}}).encode()
    (root / "text_g" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert main(["doctor"]) == 2
    assert [line.split()[2] for line in failures(capfd)] == ["autoencoder", "text_l", "text_g", "detector"]


def test_damaged_data_fails(home, capfd):
    parquet = next((home / "data" / "emoji").glob("*.parquet"))
    parquet.write_bytes(parquet.read_bytes()[:1000])
    shutil.rmtree(home / "data" / "photos")
    assert main(["doctor"]) == 2
    assert [line.split()[1] for line in failures(capfd)] == ["emoji", "photos"]


def test_no_data_is_one_failure(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SNAPGEN_HOME", str(tmp_path))
    assert main(["doctor"]) == 2
    found = failures(capfd)
    assert len(found) == 1 and "SNAPGEN_HOME" in found[0]


def test_weights_are_counted(tmp_path):
    save_file({"a": np.zeros(2**18, np.float32), "b": np.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert doctor.read_weights(tmp_path) == "2 tensors, 1.0 MB"
    with pytest.raises(UserError, match="missing"):
        doctor.read_weights(tmp_path / "no")


@pytest.mark.parametrize(
    ("name", "tested", "allowed", "status"),
    [
        ("no-such-package-at-all", "1.0", ">=1", "FAIL"),
        ("numpy", "0.0.1", "", "warn"),
        ("numpy", "0.0.1", "<0.0.2", "FAIL"),
    ],
)
def test_package_versions(name, tested, allowed, status):
    assert doctor.check_package(name, tested, allowed).status == status


def test_a_local_build_counts_as_its_version(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor.check_package("torch", "2.13.0", ">=2.13,<3").status == "ok"


def test_a_torchvision_that_breaks_the_others_fails(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "torchvision", raising=False)
    check = doctor.check_torchvision()
    assert check.status == "FAIL" and "uninstall" in check.remedy


def test_too_many_threads_are_a_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    (check,) = doctor.check_threads()
    assert check.status == "warn" and "OMP_NUM_THREADS" in check.remedy


def test_a_missing_package_is_a_line_and_no_traceback(monkeypatch):
    def gone():
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")
        yield

    monkeypatch.setattr(doctor, "check_memory", gone)
    assert [check.status for check in doctor.checks("small") if check.name == "psutil" and "does not import" in check.found] == ["FAIL"]
