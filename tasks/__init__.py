"""HOW each stage works: one word per stage; stages meet on disk and never import one another."""
