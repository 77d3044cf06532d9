"""Text tokenised once, ahead of training: written by `python -m lightning_multinorm prepare`, read by memory map.

A folder holds `manifest.json`, the tokenizer, and per split ("train", "validation") shards `train-00000.bin`, ...: the
tokens of whole documents, each followed by end-of-text, as little-endian unsigned integers and nothing else. Nothing
in it is code, or is unpickled. Sequences are cut when training, so any length is read from the same folder.
"""
