"""The page is whole, needs nothing from outside, holds what it was made from, and works in a real browser."""

import base64
import json
import re
import shutil
import sys
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids

from placement import cli, solvers
from placement.bootstrap import bootstrap
from placement.cli.insights import _planner as planner_of
from placement.compare import plan_and_compare
from placement.cost import evaluate
from placement.insight import gather, pairs_beyond_chance, study_data
from placement.placement_map import PlacementMap
from placement.report import write_report
from placement.report.bench_picture import draw_bench
from placement.report.payload import packed_triangles, payload
from placement.runtime.results import BenchResult, BenchRow, BenchRun, Spread
from placement.solvers import Options, plan
from placement.timing import Workload
from placement.topology import Links, Topology
from placement.verdict import answers
from profiler import CoterieError, Profile
from profiler.analysis import lift
from profiler.chance import shuffled
from profiler.merging import merge

TOPOLOGY = Topology.for_experts(16, 4)


def bench_result(num_ranks=4):
    times = dict.fromkeys(("dispatch", "expert", "combine", "exchange", "index", "total"), Spread(1.0, 0.5, 2.0))
    gains = dict.fromkeys(("speed_up", "exchange_speed_up", "exchange_against_linear"), Spread(1.5, 1.4, 1.6))
    sizes = {"bytes_sent": 10**6, "wire_bytes": 9e5, "interface_bytes": None, "least_bytes": 8e5}
    row = BenchRow(
        implementation="coterie",
        map="linear",
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
    planned = replace(row, map="planned", bytes_sent=7 * 10**5, predicted_layer=1.5)
    run = BenchRun(
        num_ranks, 1, 1, 512, Links.preset("h100"), (replace(row, implementation="HF all_to_all"), row, planned), {}
    )
    return BenchResult("made-up", "prefill", False, "gloo", None, 3, (run,))


def insight_of(profile, placement, held_out=None, bench=None, study=False):
    planner = partial(plan, topology=placement.topology, options=Options(num_kicks=2))
    load_only = partial(plan, topology=placement.topology, strategy="load")
    studied = study_data(profile, placement, held_out, planner) if study else None
    return gather(profile, placement, held_out=held_out, load_only=load_only, bench=bench, study=studied)


@pytest.fixture
def planned(profile):
    return plan_and_compare(profile, TOPOLOGY)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_is_self_contained(profile, planned, tmp_path):
    write_report(insight_of(profile, planned, bench=bench_result(), study=True), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"https?://", page)
    for name in ("linear", "random", "load", "search"):
        assert f"<td>{name}</td>" in page
    assert "1.50" in page
    assert "prefill on 4 ranks (gloo, through one machine&#39;s memory), 512 tokens a rank" in page
    assert "bound method" not in page
    for question in answers(insight_of(profile, planned)).values():
        assert question.question in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_page_holds_the_profiles_counts(profile, planned):
    insight = insight_of(profile, planned)
    value = payload(insight)
    assert value["load"] == profile.counts.load.sum(axis=0).tolist()
    packed = np.frombuffer(zlib.decompress(base64.b64decode(value["pairs"])), "<u4").reshape(2, -1)
    upper = np.triu_indices(16, 1)
    assert (packed == profile.counts.coactivation.sum(axis=0)[:, upper[0], upper[1]]).all()
    assert value["ranksOf"] == planned.rank_of_expert[:, :, None].tolist()
    shown = value["maps"]["plan"]["ingress"]
    assert np.allclose(shown, insight.metrics["plan"].ingress, atol=1e-4)


def test_counts_of_the_largest_models_stay_below_ten_megabytes():
    """58 layers of 256 experts and a million tokens: pairs are nearly all of the page, one layer is like another."""
    rng = np.random.default_rng(0)
    pairs = rng.poisson(rng.lognormal(6.5, 1, size=(4, 256, 256)))
    assert len(packed_triangles(pairs)) * 58 / 4 < 6e6


def test_the_page_repeats_itself(profile, planned, tmp_path):
    for name in ("one.html", "two.html"):
        write_report(insight_of(profile, planned), tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_top_one_models_and_redundant_experts_are_shown(tmp_path):
    trace = make_trace(random_ids(0, 3, 200, 8, 1), num_sequences=8)
    profile = Profile.from_tokens(make_spec(3, 8, 1), ["a", "b"], trace, {})
    placement = plan_and_compare(profile, Topology.for_experts(8, 2, 1, 2), options=Options(num_redundant=2))
    write_report(insight_of(profile, placement, study=True), tmp_path / "report.html")
    assert "a token picks one expert" in (tmp_path / "report.html").read_text()


def test_names_are_escaped(tmp_path):
    trace = make_trace(random_ids(0, 1, 60, 8, 2))
    spec = type(make_spec(1, 8, 2))("<script>", "olmoe", (0,), 8, 2, 1, 32, 16, "float32")
    profile = Profile.from_tokens(spec, ["</script><b>", "b"], trace, {})
    placement = PlacementMap.linear(spec, Topology(1, 2, 4))
    write_report(insight_of(profile, placement), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt; on 2 ranks" in page
    assert "</script><b>" not in page
    assert data_of(page)["domains"][0] == "</script><b>"


def test_a_bench_is_part_of_the_verdict(profile, planned):
    (said,) = [
        sentence
        for sentence in answers(insight_of(profile, planned, bench=bench_result()))["worth"].sentences
        if sentence.startswith("Measured on 4 ranks (gloo, through one machine's memory)")
    ]
    assert "0.7 MB sent instead of 1.0 in file order" in said
    assert draw_bench(bench_result()).startswith(b"\x89PNG")


def test_domains_that_only_seem_far_are_not_named(profile, planned):
    """The farthest domain may be so for having few tokens; the verdict names one that drifted."""
    insight = insight_of(profile, planned)
    domains = insight.domains.assign(load_distance=[0.5, 0.1], drifted=[False, True])
    sentences = answers(replace(insight, domains=domains))["domains"].sentences
    assert f"is {domains['domain'][1]} (" in sentences[0]


def test_inspect_fits_a_screen_and_says_what_the_page_says(profile, planned, tmp_path, monkeypatch, capsys):
    named = Profile.from_tokens(profile.model, ["[red]prose[/red]", "code"], profile.tokens, {})
    named.save(tmp_path / "run.profile")
    planned.save(tmp_path / "plan.json")
    printed = []
    for arguments in ((), (tmp_path / "plan.json", "--no-study")):
        monkeypatch.setattr(sys, "argv", ["coterie", "inspect", str(tmp_path / "run.profile"), *map(str, arguments)])
        with suppress(SystemExit):
            cli.main()
        printed.append(capsys.readouterr().out)
        assert len(printed[-1].splitlines()) <= 40
        assert max(map(len, printed[-1].splitlines())) <= 80
        assert "[bold" not in printed[-1]
    assert "[red]prose" in printed[0]
    text = " ".join(printed[1].split())
    for answer in answers(insight_of(profile, planned)).values():
        assert answer.question in text
    assert "busiest rank is reached by" in text


def test_plans_and_benches_of_something_else_are_refused(profile, planned):
    other = PlacementMap.linear(make_spec(2, 8, 2), Topology.for_experts(8, 4))
    with pytest.raises(CoterieError, match="the map is for"):
        gather(profile, other)
    with pytest.raises(CoterieError, match="the bench ran on 2 ranks, the plan is for 4"):
        gather(profile, planned, bench=bench_result(2))


def test_parts_of_what_a_plan_was_made_with_count_as_seen(profile, planned, tmp_path):
    profile.save(tmp_path / "run.profile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coterie", "profile", "split", str(tmp_path / "run.profile"), "--by", "domain"])
        sys.argv += ["-o", str(tmp_path / "parts")]
        with suppress(SystemExit):
            cli.main()
    part = Profile.load_from(tmp_path / "parts" / "code.profile")
    assert insight_of(part, planned).seen
    merge([tmp_path / "parts" / f"{name}.profile" for name in ("code", "prose")], tmp_path / "both.profile")
    assert insight_of(Profile.load_from(tmp_path / "both.profile"), planned).seen
    assert insight_of(profile, planned, held_out=part).seen
    both = Profile.load_from(tmp_path / "both.profile")
    of_both = plan(both, TOPOLOGY, "linear")
    assert insight_of(both, of_both, held_out=part).seen  # it was planned with that part, among others


def test_plans_with_weights_and_groups_are_judged_on_profiles_that_lack_them(profile):
    tokens = profile.require_tokens()
    code = tokens.where(tokens.domain_ids == 1)
    other = Profile.from_tokens(profile.model, ["code"], replace(code, domain_ids=np.zeros_like(code.domain_ids)), {})
    weighted = plan(profile, TOPOLOGY, "linear", Options(domain_weights={"prose": 2.0, "code": 0.0}))
    grouped = replace(profile, model=replace(profile.model, num_groups=4))
    grouped_plan = plan(grouped, TOPOLOGY, "linear", Options(preserve_groups=True))
    for placement in (weighted, grouped_plan):
        for strategy in ("search", "load"):
            assert planner_of(placement, strategy, 1)(other).model.routes_like(profile.model)


def test_the_pairs_that_are_named_are_those_most_beyond_chance():
    """Expert 0 meets three others more often than expert 9, but these by chance."""
    picks = [[0, 1]] * 100 + [[0, 2]] * 100 + [[0, 3]] * 100 + [[0, 9]] * 90
    picks += [[a, b] for a in (1, 2, 3) for b in (4, 5, 6, 7)] * 30 + [[8, 10]] * 5
    ids = np.array(picks, np.uint8)[None]
    profile = Profile.from_tokens(make_spec(1, 11, 2), ["a", "b"], make_trace(ids), {})
    best = pairs_beyond_chance(profile).iloc[0]
    assert (best["expert"], best["partner"]) == (0, 9)
    pairs = profile.counts.coactivation.sum(axis=0)[0]
    assert best["share"] == 90 / 390
    assert best["excess"] == pytest.approx(90 * (1 - 1 / lift(pairs, profile.counts.load.sum(axis=0)[0])[0, 9]))


def test_the_verdict_is_about_unseen_traffic():
    trace = make_trace(random_ids(0, 2, 2400, 16, 4), num_sequences=24)  # enough for intervals that leave no doubt
    profile = Profile.from_tokens(make_spec(2, 16, 4), ["prose", "code"], trace, {})
    planned = plan_and_compare(profile, TOPOLOGY)
    good = insight_of(profile, planned)
    assert not good.seen
    assert answers(good)["worth"].tone == "good"
    assert good.metrics["plan"].summary() == planned.metrics["search"]["held_out"]
    everything = plan(profile, TOPOLOGY)
    assert insight_of(profile, everything).seen
    assert answers(insight_of(profile, everything))["worth"].headline.startswith("Not known")
    first, second = profile.split_by_sequence()
    assert not insight_of(first, plan(first, TOPOLOGY), held_out=second).seen


def test_one_sequence_says_nothing_about_others(profile):
    tokens = profile.require_tokens()
    one = replace(tokens, sequence_ids=np.zeros_like(tokens.sequence_ids))
    one_sequence = Profile.from_tokens(profile.model, profile.domains, one, {})
    told = answers(insight_of(profile, plan(profile, TOPOLOGY), held_out=one_sequence))["worth"]
    assert told.tone != "good"
    assert "one sequence: how sure is not known" in told.sentences[0]


def test_a_loss_has_its_interval_in_the_same_words(profile):
    first, second = profile.split_by_sequence()
    told = answers(insight_of(first, plan(first, TOPOLOGY, "random"), held_out=second))["worth"].sentences[0]
    share, low, high = map(
        float, re.search(r": ([\d.]+)% more .*?interval ([+-][\d.]+)% to ([+-][\d.]+)%", told).groups()
    )
    assert low <= share <= high


def test_what_has_seen_its_traffic_costs_no_domain_anything_that_is_known(profile):
    seen = answers(insight_of(profile, plan(profile, TOPOLOGY), study=True))["domains"]
    assert seen.tone == "unsure"
    assert "it has seen what is measured on" in seen.sentences[-1]
    unseen = answers(insight_of(profile, plan_and_compare(profile, TOPOLOGY), study=True))["domains"]
    assert "This plan costs" in unseen.sentences[-1]


def test_uneven_ranks_are_drawn_as_file_order_places_them():
    ids = random_ids(0, 2, 600, 10, 2)
    ids[1] = 255  # a layer without a pick
    uneven = Profile.from_tokens(make_spec(2, 10, 2), ["a", "b"], make_trace(ids, num_sequences=12), {})
    data = payload(insight_of(uneven, plan_and_compare(uneven, Topology.for_experts(10, 4))))
    assert data["linear"] == [0, 1, 2, 3, 4, 5, 6, 7, -1, 8, 9, -1]
    assert data["maps"]["linear"]["load"][1] == [0.0] * 4
    json.dumps(data, allow_nan=False)


def test_once_per_expert_only_balance_is_worth_something(profile):
    placement = plan_and_compare(profile, TOPOLOGY, options=Options(workload=Workload(4096, "per-expert")))
    worth = answers(insight_of(profile, placement))["worth"]
    assert worth.headline == "Not worth it"  # balancing the load alone does the same
    assert "where only balance counts" in worth.sentences[-1]
    odd = replace(placement, solver={**placement.solver, "options": {"workload": {"tokens": 1}}})
    with pytest.raises(CoterieError, match=r"solver.options are none"):
        answers(insight_of(profile, odd))
    answers(insight_of(profile, replace(placement, solver={"name": "search", "options": None})))


def test_where_links_are_known_times_decide():
    """Pairs that meet on one node halve what crosses the network, and leave every rank as busy as before."""
    pairs = np.tile(np.array([[0, 2], [1, 3], [4, 6], [5, 7]], np.uint8), (100, 1))[None]
    spec = replace(make_spec(1, 8, 2), hidden_size=7168, expert_size=256)
    profile = Profile.from_tokens(spec, ["a", "b"], make_trace(pairs, num_sequences=20), {})
    topology = Topology.for_experts(8, 4, 2, links=Links.preset("h100"))
    even, apart = np.array([[0, 4, 1, 5, 2, 6, 3, 7]]), np.array([[0, 6, 2, 4, 1, 7, 3, 5]])
    insight = replace(
        insight_of(profile, PlacementMap(spec, topology, apart, {"name": "any"})),
    )
    maps = {**insight.maps, "load": PlacementMap(spec, topology, even, {"name": "load"})}
    tokens = insight.measured.tokens
    insight = replace(
        insight, maps=maps, metrics={name: evaluate(each, tokens) for name, each in maps.items()},
        intervals=bootstrap(maps, tokens),
    )  # fmt: skip
    assert insight.metrics["plan"].busiest_ingress == insight.metrics["load"].busiest_ingress
    assert answers(insight)["worth"].headline == "Perhaps worth it"


def test_times_are_of_weights_of_one_type(profile):
    narrow = Profile.from_tokens(replace(profile.model, dtype="bfloat16"), profile.domains, profile.tokens, {})
    topology = Topology.for_experts(16, 4, links=Links.preset("h100"))
    insight = insight_of(profile, plan(narrow, topology, "load"))
    assert {each.model.dtype for each in insight.maps.values()} == {"float32"}


def test_a_layer_without_picks_is_not_where_it_gains():
    ids = random_ids(0, 3, 600, 16, 4)
    ids[1] = 255
    profile = Profile.from_tokens(make_spec(3, 16, 4), ["a", "b"], make_trace(ids, num_sequences=12), {})
    (said,) = [
        sentence
        for sentence in answers(insight_of(profile, plan_and_compare(profile, TOPOLOGY)))["worth"].sentences
        if sentence.startswith("It gains most")
    ]
    assert "nan" not in said
    assert "layer 1 " not in said


def test_plans_of_the_study_are_for_what_the_plan_is_for(profile, monkeypatch):
    asked = []
    monkeypatch.setattr(solvers, "plan", lambda _profile, _topology, _strategy, options: asked.append(options))
    workload = Workload(512, "per-expert")
    options = Options(workload=workload, objective="balance", load_cap=1.2, domain_weights={"prose": 2.0})
    placement = plan(profile, TOPOLOGY, options=options)
    for strategy in ("search", "load"):
        planner_of(placement, strategy, 3)(profile)
    assert (asked[0].objective, asked[0].workload, asked[0].num_kicks) == ("balance", workload, 3)
    assert asked[0].load_cap is None  # which a part of the text may not be able to keep
    assert asked[0].domain_weights is None  # nor has a single domain one
    assert asked[1].domain_weights == {"prose": 2.0}  # what `coterie plan` compares with, too


def test_shuffled_routing_is_not_worth_a_plan(profile):
    dealt = Profile.from_tokens(profile.model, profile.domains, shuffled(profile.tokens, 0), {})
    found = answers(insight_of(dealt, plan_and_compare(dealt, TOPOLOGY)))
    assert found["worth"].tone == "bad"
    assert found["together"].headline == "Hardly any groups"


@pytest.mark.parametrize("domain_only", [True, False])
def test_traffic_that_no_expert_takes(profile, tmp_path, domain_only):
    trace = profile.tokens
    ids = trace.topk_ids.copy()
    ids[:, (trace.domain_ids == 1) | (not domain_only)] = 255
    silent = Profile.from_tokens(profile.model, profile.domains, replace(trace, topk_ids=ids), {})
    placement = plan_and_compare(silent, TOPOLOGY)
    if not domain_only:
        with pytest.raises(CoterieError, match="taken by an expert: nothing to judge"):
            insight_of(silent, placement)
        return
    insight = insight_of(silent, placement, study=True)
    assert not any("nan" in sentence for answer in answers(insight).values() for sentence in answer.sentences)
    write_report(insight, tmp_path / "report.html")


def test_weighted_domains_give_no_verdict(profile):
    weighted = plan_and_compare(profile, TOPOLOGY, options=Options(domain_weights={"prose": 1.0}, num_kicks=2))
    assert answers(insight_of(profile, weighted))["worth"].headline.startswith("Not known: the plan weighs domains")


def test_known_links_give_times(profile):
    topology = Topology.for_experts(16, 4, 2, links=Links.preset("ethernet"))
    found = answers(insight_of(profile, plan_and_compare(profile, topology)))["worth"]
    assert any("links of ethernet" in sentence for sentence in found.sentences)


def test_a_bench_says_what_its_ranks_exchanged_through():
    result = bench_result()
    (run,) = result.runs
    assert result.wire(run) == "gloo, through one machine's memory"
    assert result.wire(replace(run, num_hosts=2)) == "gloo, 2 hosts"
    assert replace(result, backend="nccl").wire(run) == "nccl"
    assert replace(result, network="1gbit").wire(replace(run, num_hosts=4)) == "1gbit cables"


def test_bench_results_round_trip_and_refuse_edits(tmp_path):
    bench_result().save(tmp_path / "bench.json")
    assert BenchResult.load_from(tmp_path / "bench.json") == bench_result()
    no_number = (tmp_path / "bench.json").read_text().replace("1000000", "null")
    older = '{"schema_version": 1, "rows": [{}]}'
    for content in (
        no_number,
        "{}",
        older,
        '{"schema_version": 3, "runs": [{}]}',
        '{"schema_version": 3, "runs": []}',
        "[]",
    ):
        (tmp_path / "bench.json").write_text(content)
        with pytest.raises(CoterieError):
            BenchResult.load_from(tmp_path / "bench.json")


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium and chromedriver here: apt-get install chromium chromium-driver")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield started
    started.quit()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_works_in_a_browser(profile, planned, tmp_path, browser, theme):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    write_report(insight_of(profile, planned, bench=bench_result(), study=True), tmp_path / "report.html")
    scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    browser.get((tmp_path / "report.html").as_uri())
    WebDriverWait(browser, 20).until(lambda page: page.execute_script("return document.body.dataset.ready") == "yes")

    def find(selector):
        return browser.find_element("css selector", selector)

    def script(code):
        return browser.execute_script(f"return {code}")

    def hover(selector, dx=0, dy=0):
        script(f"document.querySelector('{selector}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
        ActionChains(browser).move_to_element_with_offset(find(selector), dx, dy).perform()
        return find("#tip").text

    assert script("document.documentElement.dataset.theme") == theme
    script("document.documentElement.style.scrollBehavior = 'auto'")  # so that nothing moves under the pointer
    # The slider changes everything that shows a layer.
    graph, heat = (
        script("document.getElementById('graph').innerHTML"),
        script("document.getElementById('after').toDataURL()"),
    )
    find("#layer").send_keys(Keys.ARROW_RIGHT)
    assert find("#layer-name").text == "1"
    assert script("document.getElementById('graph').innerHTML") != graph
    assert script("document.getElementById('after').toDataURL()") != heat
    rows = script("[...document.querySelectorAll('#experts tbody tr')].map(row => row.cells[2].textContent)")
    assert [int(row.replace(",", "")) for row in rows] == profile.counts.load.sum(axis=0)[1].tolist()
    # Hover says exact values.
    width = script("document.getElementById('before').clientWidth")
    cell = width / 16
    text = hover("#before", (3.5 - 8) * cell, (5.5 - 8) * cell)
    count = int(profile.counts.coactivation.sum(axis=0)[1, 5, 3])
    assert text.startswith(f"experts 5 and 3\n{count} tokens")
    assert "tokens" in hover("#graph circle.node")
    assert "layer 0" in hover("#strip rect[data-layer]")
    # Search, sorting, and the other theme.
    find("#search").send_keys("7")
    assert find("#found strong").text == "Expert 7 of layer 1"
    assert find("#experts tr.found td").text == "7"
    find("#search").send_keys("777")
    assert not find("#found").text
    script("document.querySelectorAll('#experts th')[2].click()")
    sorted_rows = script(
        "[...document.querySelectorAll('#experts tbody tr')].map(row => +row.cells[2].textContent.replace(',', ''))"
    )
    assert sorted_rows == sorted(sorted_rows, reverse=True)
    assert script("document.querySelectorAll('#transfer tbody tr').length") == 4
    script("document.getElementById('theme').click()")
    assert script("document.documentElement.dataset.theme") != theme
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
