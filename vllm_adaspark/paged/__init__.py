"""What every method shares over vLLM's paged KV cache: block sums, tables, kernel adapters."""
