"""A plug-in for vLLM: Chorus models in its engine, with its paged cache."""
