"""Where experts live and when they move: formats, the host store, slots, the link, and the policies."""
