"""The durable record of what was decided: `sqlite.open_journal` fulfils `engine.ports.Journal`."""
