"""Memory that sequences hold: the paged KV cache."""
