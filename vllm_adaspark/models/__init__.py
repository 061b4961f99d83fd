"""The registered model variants: stock vLLM models with AdaSpark's layers and token order."""
