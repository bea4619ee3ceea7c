"""Where heads come from, how their slices lie on disk, and which persons they belong to."""
