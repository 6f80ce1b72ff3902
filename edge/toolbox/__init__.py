"""Tools that a model may use in a conversation, from MCP servers, and the rounds in which it does."""
