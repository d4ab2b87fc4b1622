"""Command lines: flags and messages; nothing imports them."""
