"""What an answer must match: read, compiled by llguidance, followed token by token."""
