"""Which sequences run in a step and which KV blocks they own."""
