"""Launch profiles, as far as every engine's are alike: files read whole, typed parameters."""
