"""One TOML file a preset: only what differs from the published shapes' common values."""
