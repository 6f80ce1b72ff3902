"""KV pages on disk: a pool holds some of a layer's pages, and a file without a name all of them.

Not an operator: what attention's CPU kernels reach pages through (page_store.h), and its binding (store.py).
"""
