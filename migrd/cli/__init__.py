"""The command line: it speaks HTTP with the daemon, uses the API's words, and knows nothing else.

main      the commands put together; `build()` takes those that need code above this layer
commands/ one module per subject: what to ask, what to print
watching  following one migration: level-triggered, survives a restart of the daemon
client    one call, one deadline; unix socket or TCP
stream    server-sent events with Last-Event-ID
printing  where output goes: tables for people, plain lines for pipes, JSON for scripts
text      figures for people, and the one place where foreign text is made harmless
seen      reading an answer that may be newer or older than this program
exits     exit codes, and the errors that carry them
"""
