"""Real vLLM servers with our plug-in, asked over HTTP; run by scripts/test_vllm.sh."""
