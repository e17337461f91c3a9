"""The arbiter's series: there once there is an arbiter, and under the interface's names."""

import math
import subprocess
from dataclasses import replace
from pathlib import Path

from prometheus_client import generate_latest

from migrd.arbiter import gateway, member
from migrd.engine.arbiter_port import ArbiterState
from migrd.metrics import Metrics
from migrd.metrics.arbiter import OPS, RESULTS

UP = ArbiterState("etcd", is_reachable=True, hosts=("alpha", "beta"))


def test_without_an_arbiter_there_is_no_series_of_one() -> None:
    assert b"arbiter" not in generate_latest(Metrics().registry)


def test_what_was_seen_of_the_arbiter_is_shown(promtool: Path) -> None:
    metrics = Metrics()
    watched = metrics.watch_arbiter()
    read = metrics.registry.get_sample_value
    assert math.isnan(read("migrd_arbiter_hosts") or 0)
    before = metrics.changes
    watched.looked(UP)
    watched.looked(UP)
    assert metrics.changes == before + 1, "the same again is no change"
    assert (read("migrd_arbiter_up"), read("migrd_arbiter_hosts")) == (1, 2)
    watched.looked(replace(UP, is_reachable=False, hosts=None))
    assert read("migrd_arbiter_up") == 0
    assert math.isnan(read("migrd_arbiter_hosts") or 0)
    watched.requested("txn", "ok", 0.003)
    watched.requested("txn", "late", 1.0)
    watched.requested("made up", "strange", 1.0)
    for op, result in (("txn", "ok"), ("txn", "late"), ("other", "other")):
        labels = {"op": op, "result": result}
        assert read("migrd_arbiter_requests_total", labels) == 1
    assert read("migrd_arbiter_request_seconds_count", {"op": "txn"}) == 2
    check = [str(promtool), "check", "metrics"]
    done = subprocess.run(
        check, input=generate_latest(metrics.registry), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_operation_and_every_result_has_a_name_of_its_own() -> None:
    ops = {op.name for op in vars(gateway).values() if isinstance(op, member.Op)}
    assert ops - set(OPS) == {"status", "lease_timetolive"}, "the doctor's alone"
    assert set(OPS) <= ops
    assert RESULTS == member.RESULTS
