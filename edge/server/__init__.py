"""The OpenAI protocol over HTTP, on edge/serving."""
