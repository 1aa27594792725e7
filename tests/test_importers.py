"""Routing recorded elsewhere comes in as it is, or is refused in one line that names the file."""

import numpy as np
import pytest
from conftest import random_ids

from profiler import CoterieError
from profiler.importers.arrays import read_arrays
from profiler.importers.known import Known


@pytest.fixture
def arrays():
    return {
        "topk_ids": random_ids(0, 3, 50, 16, 4).transpose(1, 0, 2),
        "topk_weights": np.random.default_rng(0).random((50, 3, 4)).astype(np.float16),
        "sequence_ids": np.arange(50) // 10,
        "domain_ids": np.arange(50) % 2,
        "domain_names": np.array(["law", "code"]),
        "num_experts": np.array(16),
        "layer_ids": np.array([1, 2, 4]),
    }


def test_everything_comes_in(arrays, tmp_path):
    np.savez(tmp_path / "routing.npz", **arrays)
    profile = read_arrays(tmp_path / "routing.npz", Known(hidden_size=32, expert_size=64), decode=True)
    assert (profile.tokens.topk_ids == arrays["topk_ids"].transpose(1, 0, 2)).all()
    assert (profile.tokens.topk_weights == arrays["topk_weights"].transpose(1, 0, 2)).all()
    assert profile.domains == ("law", "code")
    assert profile.model.layer_ids == (1, 2, 4)
    assert (profile.model.name, profile.model.hidden_size, profile.model.num_experts) == ("routing", 32, 16)
    assert profile.tokens.phase.all()


def test_ids_alone_are_enough(arrays, tmp_path):
    ids = arrays["topk_ids"].astype(np.int64)
    ids[3, 1, 2] = -1
    np.save(tmp_path / "routing.npy", ids)
    profile = read_arrays(tmp_path / "routing.npy")
    assert profile.model.num_experts == 16
    assert profile.tokens.picked.sum() == 50 * 3 * 4 - 1
    assert not profile.tokens.phase.any()


def test_all_ones_are_no_expert_or_asked_for(arrays, tmp_path):
    for dtype in (np.uint8, np.uint16):
        ids = arrays["topk_ids"].astype(dtype)
        ids[3, 1, 2] = np.iinfo(dtype).max
        np.save(tmp_path / "routing.npy", ids)
        if dtype == np.uint8:
            with pytest.raises(CoterieError, match="255, which is an expert or, all ones, none: .*--num-experts"):
                read_arrays(tmp_path / "routing.npy")
        profile = read_arrays(tmp_path / "routing.npy", Known(num_experts=16) if dtype == np.uint8 else Known())
        assert profile.model.num_experts == 16
        assert profile.tokens.picked.sum() == 50 * 3 * 4 - 1


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_the_highest_number_with_a_sign_is_an_expert(arrays, tmp_path, dtype):
    ids, highest = arrays["topk_ids"].astype(dtype), np.iinfo(dtype).max
    ids[3, 1, 2], ids[4, 1, 2] = highest, -1
    np.save(tmp_path / "routing.npy", ids)
    with pytest.raises(CoterieError, match=rf"layer 1: expert {highest}, must be below 16"):
        read_arrays(tmp_path / "routing.npy", Known(num_experts=16))
    if dtype == np.int8:
        profile = read_arrays(tmp_path / "routing.npy")
        assert (profile.model.num_experts, profile.tokens.picked.sum()) == (128, 50 * 3 * 4 - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": np.zeros((50, 3))}, "must be whole numbers"),
        ({"topk_ids": np.zeros((50, 3, 4), dtype=int)}, "layer 1: token 0 picked .* an expert twice"),
        ({"num_experts": np.array(9)}, "layer 1: expert 1., must be below 9"),
        ({"num_experts": np.array(10**6)}, "num_experts 1000000: must be between"),
        ({"num_experts": np.array([16, 16])}, r"num_experts is int64 \(2,\): must be whole numbers \(\)"),
        ({"num_experts": np.array(np.nan)}, "num_experts is float64"),
        ({"layer_ids": np.array([1, 2])}, r"layer_ids is int64 \(2,\): must be whole numbers \(3,\)"),
        ({"layer_ids": np.array([1, 2, np.nan])}, "layer_ids is float64"),
        ({"domain_names": np.array([["law", "code"]])}, "domain_names is .* must be texts"),
        ({"domain_names": np.array([1, 2])}, "domain_names is int64"),
        ({"domain_names": np.array(["law", "law"])}, "domain_names .* must differ"),
        ({"layer_ids": np.array([1, 2, 2])}, "must be distinct"),
        ({"sequence_ids": np.arange(49)}, r"must be whole numbers \(50,\)"),
        ({"sequence_ids": np.arange(50) - 1}, "sequence_ids: -1"),
        ({"domain_ids": np.full(50, 300)}, "domain_ids: 300, must be between 0 and 254"),
        ({"topk_weights": np.zeros((50, 3, 3))}, "topk_weights .* shape of topk_ids"),
        ({"topk_weights": np.full((50, 3, 4), np.nan)}, "topk_weights of layer 1: not finite"),
        ({"topk_weights": np.full((50, 3, 4), 1e6)}, "topk_weights of layer 1: not finite"),
        ({"topk_weights": np.full((50, 3, 4), "x")}, "topk_weights is <U1"),
    ],
)
def test_misfits_are_refused(arrays, tmp_path, change, message):
    np.savez(tmp_path / "routing.npz", **{**arrays, **change})
    with pytest.raises(CoterieError, match=message) as caught:
        read_arrays(tmp_path / "routing.npz")
    assert str(caught.value).startswith(f"{tmp_path / 'routing.npz'}: ")


def test_other_files_are_refused(arrays, tmp_path):
    np.savez(tmp_path / "routing.npz", **arrays)
    data = (tmp_path / "routing.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "other.npz", ids=np.zeros(3))
    for name in ("cut.npz", "text.npz", "objects.npy", "other.npz", "missing.npz"):
        with pytest.raises(CoterieError, match=name):
            read_arrays(tmp_path / name)
