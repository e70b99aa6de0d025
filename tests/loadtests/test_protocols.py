"""The script on a tiny folder of files, and, where the real ones are, one of the reference figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loadtests import protocol_jobs, protocols, resnet20
from loadtests.errors import MissingFile
from loadtests.protocol_jobs import METHODS, Bench, Job, Settings
from loadtests.protocol_orders import PROTOCOLS
from loadtests.report import ROOT

IMAGES, CORRUPTIONS = 12, ("fog", "snow")


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)

    def pixels(count=IMAGES):
        return random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)

    for name in CORRUPTIONS:
        np.savez(tmp_path / f"{name}.npz", images=pixels())
    np.savez(tmp_path / "clean.npz", images=pixels(), labels=(np.arange(IMAGES) % 10).astype(np.uint8))
    np.savez(tmp_path / "source.npz", images=pixels(40))
    mixed, correlated = random.permutation(2 * IMAGES), random.permutation(IMAGES)
    np.savez(tmp_path / "orders.npz", corruptions=np.array(CORRUPTIONS), mixed=mixed, correlated=correlated)
    torch.manual_seed(0)
    save_file(resnet20.build().state_dict(), tmp_path / "resnet20.safetensors")
    return tmp_path


def script(*arguments):
    command = [sys.executable, str(ROOT / "loadtests" / "protocols.py"), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture
def main(monkeypatch):
    """The script in this process."""
    threads = torch.get_num_threads()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["protocols.py", *map(str, arguments)])
        return protocols.main()

    yield call
    torch.set_num_threads(threads)
    protocol_jobs.bench.cache_clear()


@pytest.mark.slow
def test_all_protocols_and_methods(folder, main, capsys):
    file = folder / "out.json"
    assert main("--data", folder, "--batch", 4, "--eata-cost", 3, "--json", file) == 0
    printed = capsys.readouterr()
    told = json.loads(file.read_text())
    assert told["script"] == "protocols"
    found = told["figures"]
    for protocol in PROTOCOLS:
        for method in METHODS:
            assert 0 <= found[f"error/{protocol}/{method}"] <= 100
        for method in ("frozen", "batch_statistics", "eata", "eata_per_stream"):
            assert found[f"standard_error/{protocol}/{method}"] >= 0
        for method in ("eata", "default"):
            assert {f"{what}/{protocol}/{method}" for what in ("forgetting", "source_mismatch")} <= set(found)
        assert found[f"lowest/{protocol}/default"] in (0, 1)
        assert protocol in printed.out
    assert len({found[f"error/{protocol}/frozen"] for protocol in PROTOCOLS}) == 1
    assert found["error/interleaved/eata_per_stream"] == found["error/per_shift/eata"]
    assert found["share_learned/full_rate/eata"] == 2 / 6  # of 6 requests the first and the fourth
    assert found["cost/full_rate/eata"] == 3.0
    assert found["cost/full_rate/default"] > 0
    assert "[22/22, " in printed.err


@pytest.mark.slow
def test_some_of_each_on_two_processes(folder):
    (folder / "snow.npz").unlink()
    arguments = ("--protocols", "continual", "--methods", "default,frozen", "--corruptions", "fog", "--jobs", 2)
    done = script("--data", folder, *arguments, "--json", folder / "out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "out.json").read_text())["figures"]
    assert {"error/continual/default/fog", "error/continual/frozen/fog", "lowest/continual/default"} <= set(found)
    assert not [name for name in found if "snow" in name or "eata" in name]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--protocols", "continual,sideways"), "sideways: not one of per_shift, continual"),
        (("--batch", "257"), "--batch must be 1 … 256, not 257"),
        (("--jobs", "0"), "--jobs must be 1 or more, not 0"),
        (("--eata-cost", "0"), "a cost must be above 0, not 0.0"),
    ],
)
def test_a_wrong_argument_is_told(folder, main, capsys, arguments, told):
    with pytest.raises(SystemExit) as end:
        main("--data", folder, *arguments)
    assert end.value.code == 2
    assert told in capsys.readouterr().err


def test_a_missing_file_is_told(folder, main):
    with pytest.raises(MissingFile, match=r"hail\.npz does not exist"):
        main("--data", folder, "--corruptions", "fog,hail")


@pytest.mark.slow
def test_the_recorded_error_of_eata():
    data = Path(os.environ.get("TTA_DATA") or ROOT.parent / "shared" / "data" / "cifar")
    if not (data / "reference_eata.npz").is_file():
        pytest.skip("the CIFAR files are not here; TTA_DATA names their folder")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = Bench(Settings(data, ("gaussian_noise",), 200)).run(Job("eata", "continual"), None)
    finally:
        torch.set_num_threads(threads)
    assert run.wrong.sum() == 574  # of 2,000: the 28.70 % of the authors' own code
    assert run.probe.source.mean() < 0.15
