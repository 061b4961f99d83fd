"""What the plugin adds to vLLM's HTTP server; on with ``VLLM_PLUGINS=adaspark,adaspark_http``."""
