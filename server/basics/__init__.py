"""What any layer may use and that uses nothing: sizes, names, waiting, files that survive."""
