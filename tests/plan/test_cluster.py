from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lsh.errors import ConfigError
from megatron_lsh.plan.cluster import Link, Rate, cluster_of, read_cluster
from tests.plan.helpers import document

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_read_and_say_that_nobody_measured_them(path: Path) -> None:
    cluster = read_cluster(path)
    assert cluster.source == "datasheet" and "NOT measured" in path.read_text()
    assert cluster.nodes > 1 and cluster.across.bandwidth < cluster.inside.bandwidth * cluster.ranks_per_node
    assert read_cluster(path, nodes=64).ranks == 64 * cluster.ranks_per_node


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node": 3}, "node (3) must be one of name, source, nodes"),
        ({"nodes": 0}, "nodes (0) must be at least 1"),
        ({"nodes": 2.5}, "nodes (2.5) must be an integer"),
        ({"nodes": True}, "nodes (True) must be an integer"),
        ({"nodes": None}, "nodes (absent) must be given"),
        ({"memory_gib": float("nan")}, "memory_gib (nan) must be a finite number"),
        ({"memory_gib": -1}, "memory_gib (-1) must be above 0"),
        ({"memory_gib": "much"}, "memory_gib (much) must be a finite number"),
        ({"memory_gib": [80]}, "memory_gib ([80]) must be a finite number"),
        ({"source": "hearsay"}, "source (hearsay) must be one of datasheet, measured"),
        ({"name": "a\0b"}, "name (a\\x00b) must not contain a null character"),
        ({"compute": 7}, "compute (7) must be a mapping of dense_tflops"),
        ({"compute": {"dense_tflops": 1}}, "compute.grouped_tflops (absent) must be given"),
        ({"compute": {"dense_tflops": [[1, 2], [1, 3]], "grouped_tflops": 1}}, "must have rising sizes"),
        ({"compute": {"dense_tflops": [[1, float("inf")]], "grouped_tflops": 1}}, "(inf) must be a finite number"),
        ({"compute": {"dense_tflops": [], "grouped_tflops": 1}}, "must have between 1 and 100 points"),
        ({"compute": {"dense_tflops": [5], "grouped_tflops": 1}}, "(5) must be pairs [size, number]"),
        ({"across": {"gbit_per_s": 0}}, "across.gbit_per_s (0) must be above 0"),
        ({"across": {"latency_us": 3}}, "across.gbit_per_s (absent) must be given, or alltoall_us"),
        ({"across": {"gbit_per_s": 1, "latency_us": -1}}, "across.latency_us (-1) must be at least 0"),
        ({"across": {"alltoall_us": [[1, 5], [2, 4]]}}, "must be at least two pairs [bytes, microseconds], both rising"),
        ({"across": {"gbit_per_s": 1, "alltoall_us": [[1, 5], [2, 6]]}}, "must not be given with gbit_per_s"),
        ({"across": {"gbit_per_s": 1, "oversubscription": 0.5}}, "across.oversubscription (0.5) must be at least 1"),
        ({"inside": {"gbit_per_s": 1, "nics_per_node": 2}}, "inside.nics_per_node (2) must be one of gbit_per_s"),
        ({"inside": None}, "inside (absent) must be given with 2 ranks per node"),
        ({"overlap": {"slowdown": 0.9}}, "overlap.slowdown (0.9) must be at least 1"),
        ({"routing": {"max_over_mean": "1e400"}}, "routing.max_over_mean (1e400) must be a finite number"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_rule_and_a_fix(changes: dict[str, Any], words: str) -> None:
    wrong = {key: value for key, value in document(**changes).items() if value is not None or key == "nodes"}
    with pytest.raises(ConfigError) as error:
        cluster_of(wrong, "c.yaml")
    assert f"--cluster (c.yaml): {words}" in str(error.value).replace("\n", " ") or words in str(error.value)
    assert all(
        line.startswith("--cluster (c.yaml): ") and line.count(": ") >= 2 for line in str(error.value).splitlines()
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: [", "must be a YAML file"),
        ("- 1\n- 2\n", "must hold a mapping"),
        ("nodes: 1\nnodes: 2\n", "is given twice"),
        ("!!python/object/apply:os.system [echo]", "must be a YAML file"),
        ("include: c.yaml\n", "must not include files without end"),
        ("include: 7\n", "include (7) must be the name of a file"),
        ("include: nowhere.json\n", "must be a readable file"),
        ("\0", "must be a YAML file"),
    ],
)
def test_a_file_that_cannot_be_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"--cluster \(") as error:
        read_cluster(tmp_path / "c.yaml")
    assert words in str(error.value)


def test_an_included_file_gives_what_the_file_leaves_out(tmp_path: Path) -> None:
    measured = {"source": "measured", "across": {"alltoall_us": [[1000, 10], [11000, 20]]}, "compute": {"step_ms": 3}}
    (tmp_path / "primitives.json").write_text(json.dumps(measured))
    own = document(include="primitives.json")
    del own["across"]
    (tmp_path / "c.yaml").write_text(json.dumps(own))
    cluster = read_cluster(tmp_path / "c.yaml")
    assert (cluster.source, cluster.step_seconds) == ("measured", 0.003)
    assert cluster.across.bandwidth == pytest.approx(1e9) and cluster.dense.at(5) == 1e9


def test_curves_by_hand() -> None:
    rate = Rate(((10.0, 1.0), (1000.0, 3.0)))
    assert [rate.at(size) for size in (1, 10, 100, 1000, 5000)] == pytest.approx([1, 1, 2, 3, 3])
    link = Link(((0.0, 1e-3), (1000.0, 3e-3), (2000.0, 7e-3)), ranks=2)
    assert [link.seconds(size, 2) for size in (500, 1500, 3000)] == pytest.approx([2e-3, 5e-3, 11e-3])
    assert link.seconds(0, 2) == link.seconds(10, 1) == 0.0
    assert link.seconds(1000, 8) == pytest.approx(3 * 1e-3 + 2e-3)  # three steps of starting
    assert link.seconds(1000, 2, faster=4) == pytest.approx(1e-3 + 2e-3 / 4)
    link = Link(link.points, ranks=2, speeds={"reduction": 2.0, "send": 4.0})
    assert link.seconds(1000, 8, kind="reduction") == pytest.approx(2 * 3 * 1e-3 + 2e-3 / 2)
    assert link.seconds(1000, 8, kind="send") == pytest.approx(1e-3 + 2e-3 / 4)
    assert link.seconds(1000, 8, kind="hop") == link.seconds(1000, 8)
