"""The OpenAI-compatible server: the protocol, the HTTP application, its metrics and its page."""
