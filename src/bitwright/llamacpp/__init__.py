"""llama.cpp: its files, names, tokenizers and mixes."""
