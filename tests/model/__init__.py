"""The handover as a model: every order of steps, crashes, and lost or repeated messages."""
