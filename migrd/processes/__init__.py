"""Processes that outlive this daemon, whatever runs in them: started, named, watched, proven dead.

process    which process is which, over restarts of this daemon
instance   the directory of one of them, and what its launch record says
spawn      starting one, detached
mappings   what one has mapped
memlock    how much memory one may lock
"""
