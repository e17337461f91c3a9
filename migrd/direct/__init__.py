"""The engine for VMMs that hand their memory over: migrd harvests, moves and hands over itself."""
