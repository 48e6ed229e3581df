"""One file per subcommand: options and wiring, no math; no command imports another."""
