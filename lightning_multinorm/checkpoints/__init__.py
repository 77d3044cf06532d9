"""Checkpoints that appear whole or not at all, run no code when read, and do not depend on how a model is spread.

- `files`: a file or a folder that takes its name once it is whole and on the disk;
- `damage`: what is wrong with a checkpoint, before it is read;
- `spread`: weights and optimizer states of spread models as whole tensors;
- `folders`: the same as folders of shards;
- `reading`: either format, as a single file would hold it;
- `last`: the newest whole checkpoint of a run;
- `io`: the plugins that Lightning's Trainer takes.
"""
