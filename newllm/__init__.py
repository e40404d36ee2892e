"""newllm: research on small language models that keep something between positions or between texts."""
