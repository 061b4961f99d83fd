"""AdaSpark (arXiv 2604.08077): cube-selective attention and a token-selective FFN."""
