"""The page is whole, needs nothing from outside, and says what it was made from."""

import re

import pytest
from conftest import make_spec, make_trace, random_ids

from placement.compare import plan_and_compare
from placement.placement_map import PlacementMap
from placement.report import write_report
from placement.runtime.results import BenchResult, BenchRow, BenchRun, Spread
from placement.topology import Links, Topology
from profiler import CoterieError, Profile


def bench_result(num_ranks=4):
    times = dict.fromkeys(("dispatch", "expert", "combine", "exchange", "index", "total"), Spread(1.0, 0.5, 2.0))
    gains = dict.fromkeys(("speed_up", "exchange_speed_up", "exchange_against_linear"), Spread(1.5, 1.4, 1.6))
    sizes = {"bytes_sent": 10**6, "wire_bytes": 9e5, "interface_bytes": None, "least_bytes": 8e5}
    row = BenchRow(
        implementation="coterie",
        map="planned",
        fan_out=2.5,
        rows_per_token=2.5,
        remote_rows_per_token=1.9,
        predicted_exchange=None,
        predicted_layer=None,
        max_difference=1e-6,
        **sizes,
        **times,
        **gains,
    )
    run = BenchRun(num_ranks, 1, 512, Links.preset("h100"), (row,), {})
    return BenchResult("made-up", "prefill", False, "gloo", None, 3, (run,))


def test_the_page_is_self_contained(profile, tmp_path):
    placement = plan_and_compare(profile, Topology.for_experts(16, 4))
    write_report(profile, placement, bench_result(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert page.count("<section data-layer") == profile.model.num_layers
    assert page.count("data:image/png;base64,") == 3 * profile.model.num_layers + 1  # and the bench
    for name in ("linear", "random", "load", "search"):
        assert f"<td>{name}</td>" in page
    assert "1.50" in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_many_layers_and_top_one_still_fit(tmp_path):
    trace = make_trace(random_ids(0, 20, 60, 8, 1))
    profile = Profile.from_tokens(make_spec(20, 8, 1), ["a", "b"], trace, {})
    placement = plan_and_compare(profile, Topology.for_experts(8, 2))
    write_report(profile, placement, None, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<section data-layer") == 8
    assert "Measured:" not in page


def test_names_are_escaped(tmp_path):
    trace = make_trace(random_ids(0, 1, 60, 8, 2))
    spec = type(make_spec(1, 8, 2))("<script>", "olmoe", (0,), 8, 2, 1, 32, 16, "float32")
    profile = Profile.from_tokens(spec, ["a", "b"], trace, {})
    write_report(profile, PlacementMap.linear(spec, Topology(1, 2, 4)), None, tmp_path / "report.html")
    assert "&lt;script&gt; on 2 ranks" in (tmp_path / "report.html").read_text()


def test_plans_and_benches_of_something_else_are_refused(profile, tmp_path):
    placement = PlacementMap.linear(profile.model, Topology.for_experts(16, 4))
    other = PlacementMap.linear(make_spec(2, 8, 2), Topology.for_experts(8, 4))
    with pytest.raises(CoterieError, match="the map is for"):
        write_report(profile, other, None, tmp_path / "report.html")
    with pytest.raises(CoterieError, match="the bench ran on 2 ranks, the plan is for 4"):
        write_report(profile, placement, bench_result(2), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_bench_results_round_trip_and_refuse_edits(tmp_path):
    bench_result().save(tmp_path / "bench.json")
    assert BenchResult.load_from(tmp_path / "bench.json") == bench_result()
    no_number = (tmp_path / "bench.json").read_text().replace("1000000", "null")
    older = '{"schema_version": 1, "rows": [{}]}'
    for content in (
        no_number,
        "{}",
        older,
        '{"schema_version": 2, "runs": [{}]}',
        '{"schema_version": 2, "runs": []}',
        "[]",
    ):
        (tmp_path / "bench.json").write_text(content)
        with pytest.raises(CoterieError):
            BenchResult.load_from(tmp_path / "bench.json")
