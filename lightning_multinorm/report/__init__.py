"""One self-contained page, and its figures as files, out of the logs of one run or several."""
