"""What a trained model is for: text out of it (`generation`), and a folder that others can load (`export`).

Both read a checkpoint alone, with no trainer and no configuration. Stands on `checkpoints`, `data` and `llama`.
"""
