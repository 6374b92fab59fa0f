"""What any layer may use and that uses nothing: sizes, names, addresses, words of messages."""
