"""Adapters to Linux: iommufd, VFIO character devices, sysfs, uevents.

All verbs here block and are called through `migrd.engine.threads.in_thread`. What an errno means is
said once, in one table per call; what the kernel would answer with a success that is none, these
adapters make impossible to ask.
"""
