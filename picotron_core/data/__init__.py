"""Text to batches: corpus, tokenizer, token cache, sampler, loader."""
