"""Ours and the peers on real language models: the same tokens, the same sizes, judged alike. See __main__.py."""
