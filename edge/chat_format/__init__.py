"""MiniCPM4's chat format: what replies and prompts hold besides plain text, and its OpenAI shapes."""
