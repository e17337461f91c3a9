"""Daemon to daemon: HTTPS with mutual TLS between the migrd of two hosts.

asking.py     ports.Peer over any exchange of bytes       client.py   that exchange, over HTTPS
answering.py  bytes to engine.peer_service and back       server.py   the listener around it
messages.py   what the bytes mean                         tls.py      who may speak at all
"""
