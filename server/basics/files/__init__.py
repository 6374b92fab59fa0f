"""Files that a crash leaves whole, what a directory lets one do, and files as people save them."""
