"""Pictures of training and results as PNG files, and a page that holds them.

`draw_*` returns a matplotlib figure, to look at or to change; the function without the prefix
writes it to a file. Nothing goes through pyplot, so nothing is shared between threads.
"""
