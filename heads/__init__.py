"""Where heads come from, how their slices lie on disk and are checked, and which persons they belong to."""
