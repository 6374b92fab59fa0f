"""What the bodies of requests and answers hold, field by field."""
