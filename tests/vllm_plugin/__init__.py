"""The parts of the plug-in that know no vLLM; tests/vllm has the rest, with real servers."""
