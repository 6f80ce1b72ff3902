"""LLMxMapReduce (arXiv 2410.09342): questions about documents of any length, by a model of any context."""
