"""What a user may get wrong, and the line that the command line answers with."""
