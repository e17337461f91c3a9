"""A fleet of thousands of hosts on the simulator: what it asks of an arbiter, and what gives first.

racks of hosts, each the real engine on simulated QEMUs          fleet.py
the arbiter: one queue before measured latencies                 latencies.py
drains, spells of trouble, and what they cost                    scenarios.py
.venv/bin/python -m tests.fleet                                  the report
"""
