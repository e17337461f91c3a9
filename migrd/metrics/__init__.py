"""Prometheus metrics: one module per subject.

    recorder     Metrics: the calls that the rest of the daemon makes
    migrations   outcomes, phases, blackouts, rounds; gauges of migrations going on
    readiness    what /readyz would answer
    vms          dirty rates and verdicts of VMs
    devices      IOMMUs and the devices behind them
    daemon       event loop, journal, QMP, peers, process
    loop_lag     the probe behind migrd_event_loop_lag_seconds
    labels       bounded label values
    render       our own renderer for the series that come and go
    exposition   the snapshot that /metrics serves

Names, units and labels are part of the interface: they change only together with README.
"""

from migrd.metrics.exposition import Exposition, Snapshot
from migrd.metrics.loop_lag import LoopLagProbe
from migrd.metrics.recorder import Metrics

__all__ = ["Exposition", "LoopLagProbe", "Metrics", "Snapshot"]
