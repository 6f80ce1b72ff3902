"""Long-context accuracy of a bundle: RULER's kinds of questions made offline, asked and scored; and perplexity."""
