"""Hub folders."""
