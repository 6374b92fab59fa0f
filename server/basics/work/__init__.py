"""Long work on other threads: started, ended cleanly, and the ways in which it fails."""
