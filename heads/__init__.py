"""Where heads come from, and who they are."""
