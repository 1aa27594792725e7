"""Did the embedded model learn routing that placement can use? Its routing against the same routing shuffled."""

import tempfile
from pathlib import Path

from benchmarks.record import write
from placement.compare import plan_and_compare
from placement.topology import Topology
from profiler import zoo
from profiler.chance import shuffled
from profiler.documents import read_documents
from profiler.loading import load_model
from profiler.profile import Profile
from profiler.profiling import profile_model

METRICS = ("fan_out", "busiest_ingress", "imbalance_ratio", "intra_share")


def main() -> None:
    loaded = load_model(None, "cpu")
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for texts in (zoo.CALIBRATION, zoo.HELD_OUT):
            out = Path(folder) / texts.name
            profile_model(loaded, read_documents([texts]), out)
            parts.append(Profile.load_from(out))
    dealt = [Profile.from_tokens(part.model, part.domains, shuffled(part.tokens, 0), {}) for part in parts]
    rows = []
    for num_ranks in (4, 8):
        for routing, (planned, unseen) in (("the model's", parts), ("shuffled", dealt)):
            topology = Topology.for_experts(planned.model.num_experts, num_ranks)
            metrics = plan_and_compare(planned, topology, held_out=unseen).metrics
            for strategy, figures in metrics.items():
                rows.append([num_ranks, routing, strategy, *(figures["held_out"][name]["mean"] for name in METRICS)])
    write(
        "routing_structure",
        "Routing of the embedded model has structure",
        f"Planned on {parts[0].num_tokens:,} tokens of calibration text, measured on {parts[1].num_tokens:,} tokens of "
        "held-out text; mean over layers. Shuffled: the same loads in every layer, picks dealt to tokens at random.",
        ("ranks", "routing", "strategy", *METRICS),
        rows,
    )


if __name__ == "__main__":
    main()
