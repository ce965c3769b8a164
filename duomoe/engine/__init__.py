"""Requests, who runs next, and the loop that runs them."""
